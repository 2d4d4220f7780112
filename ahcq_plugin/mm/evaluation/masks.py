# SPDX-License-Identifier: Apache-2.0
"""Masks as COCO run lengths (RLE): ``{"size": [H, W], "counts": str}``, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor

from ahcq_plugin.metrics.mask_iou import iou_of_areas
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.zoo.segmentations import problem_of

RLE = dict


def encode(masks: Tensor) -> list[RLE]:
    """RLE of each of ``masks``, bool (N, H, W)."""
    if not len(masks):
        return []
    # pycocotools wants (H, W, N) in Fortran order, which is (N, W, H) in C order.
    columns = masks.transpose(1, 2).contiguous().cpu().numpy().astype(np.uint8)
    return [_plain(rle) for rle in coco_mask.encode(columns.transpose(2, 1, 0))]


def decode(rles: Sequence[RLE], size: tuple[int, int]) -> np.ndarray:
    """bool (N, H, W) from RLEs; ``size`` is (H, W), for N = 0."""
    if not len(rles):
        return np.zeros((0, *size), dtype=bool)
    return coco_mask.decode(list(rles)).transpose(2, 0, 1).astype(bool)


def from_annotation(segmentation: dict | list, size: tuple[int, int]) -> RLE:
    """RLE of a COCO ``segmentation`` (polygons, uncompressed or compressed run lengths); ``size``: (H, W).

    Raises: DataError: it cannot be used; pycocotools would crash on some of these.
    """
    problem = problem_of(segmentation, size)
    if problem:
        raise DataError(f"a segmentation cannot be used: {problem}")
    height, width = size
    if isinstance(segmentation, list):
        return _plain(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return _plain(coco_mask.frPyObjects(segmentation, height, width))
    return _plain(segmentation)


def areas(rles: Sequence[RLE]) -> list[int]:
    """Pixels of each mask."""
    return [int(coco_mask.area(rle)) for rle in rles]


def pairwise_iou(first: Sequence[RLE], second: Sequence[RLE]) -> list[float]:
    """Intersection over union of the i-th of ``first`` with the i-th of ``second``; two empty masks agree: 1."""
    if len(first) != len(second):
        raise ValueError(f"as many masks on both sides, got {len(first)} and {len(second)}")
    ious = []
    for one, other in zip(first, second, strict=True):
        intersection = int(coco_mask.area(coco_mask.merge([one, other], intersect=True)))
        union = sum(areas([one, other])) - intersection
        ious.append(iou_of_areas(intersection, union))
    return ious


def _plain(rle: dict) -> RLE:
    counts = rle["counts"]
    return {"size": [int(n) for n in rle["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}
