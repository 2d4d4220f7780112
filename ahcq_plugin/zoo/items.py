# SPDX-License-Identifier: Apache-2.0
"""Images with boxes and masks to measure on: generated scenes and COCO folders."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ahcq_plugin.zoo.coco import check_ids, read_content
from ahcq_plugin.zoo.images import decode_image
from ahcq_plugin.zoo.scenes import box_of, render_scene
from ahcq_plugin.zoo.segmentations import problem_of

#: The 64 test scenes every figure is given for. Training and checks during it use other seeds.
TEST_SCENES, TEST_SEED = 64, 20260101


@dataclass(frozen=True)
class Item:
    """One image and its objects, all lists in one order."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (N, 4) float32, xyxy in pixels of the image
    masks: list[np.ndarray]  # N times (H, W) bool
    areas: np.ndarray  # (N,) float, square pixels, as the data set counts them
    image_id: int = 0
    categories: list[int] = field(default_factory=list)


def scene_items(count: int = TEST_SCENES, seed: int = TEST_SEED, size: int = 256) -> Iterator[Item]:
    """``render_scene((seed, i), size)`` with tight boxes; scenes without an object are passed over."""
    for index in range(count):
        image, masks = render_scene((seed, index), size)
        if masks:
            boxes = np.array([box_of(mask) for mask in masks], np.float32)
            yield Item(image, boxes, masks, np.array([float(mask.sum()) for mask in masks]), index, [1] * len(masks))


def coco_items(folder: str | Path, ids: list[int] | None = None) -> Iterator[Item]:
    """The images of a COCO folder (``instances.json``, ``images/``) with the annotated boxes; crowds are left out.

    Raises FileNotFoundError or ValueError when an image is missing or unreadable.
    """
    coco = read_coco(folder)
    for image_id in sorted(coco.imgs) if ids is None else ids:
        annotations = [a for a in coco.loadAnns(coco.getAnnIds(image_id)) if not a.get("iscrowd")]
        if not annotations:
            continue
        row = coco.imgs[image_id]
        check_masks(folder, row, annotations)
        image = read_image(folder, row["file_name"])
        if image.shape[:2] != (row["height"], row["width"]):
            raise ValueError(
                f"{folder}: {row['file_name']} has {image.shape[:2]} pixels (H, W), its row says "
                f"{(row['height'], row['width'])}"
            )
        boxes = np.array([a["bbox"] for a in annotations], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        yield Item(
            image,
            boxes,
            [coco.annToMask(a).astype(bool) for a in annotations],
            np.array([a["area"] for a in annotations]),
            image_id,
            [a["category_id"] for a in annotations],
        )


def check_masks(folder: str | Path, image: dict[str, Any], annotations: list[dict[str, Any]]) -> None:
    """ValueError for a segmentation that cannot be one of its image: pycocotools would crash on some."""
    for annotation in annotations:
        problem = problem_of(annotation.get("segmentation"), (image["height"], image["width"]))
        if problem:
            raise ValueError(f"{folder}: the segmentation of annotation {annotation['id']} cannot be used: {problem}")


def read_coco(folder: str | Path):
    """The pycocotools index of ``instances.json`` in a COCO folder, read without its messages.

    Raises: FileNotFoundError, ValueError: no such file, or not in COCO's format.
    """
    from pycocotools.coco import COCO

    coco = COCO()
    ann_file = Path(folder) / "instances.json"
    coco.dataset = read_content(ann_file)
    check_ids(ann_file, coco.dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_image(folder: str | Path, file_name: str) -> np.ndarray:
    """An image of a COCO folder as ``decode_image`` gives it. Raises: FileNotFoundError: no such file."""
    path = Path(folder) / "images" / Path(file_name).name
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    return decode_image(path.read_bytes(), path)
