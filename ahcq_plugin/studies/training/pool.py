# SPDX-License-Identifier: Apache-2.0
"""Real images with instance masks, decoded once and kept in memory at two scales."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ahcq_plugin.zoo.items import check_masks, read_coco, read_image
from ahcq_plugin.zoo.scenes import box_of

logger = logging.getLogger(__name__)
#: Seed of the choice of held-out images; part of what "trained on" means for the shipped weights.
HOLD_OUT_SEED = 2026


@dataclass(frozen=True)
class Patch:
    """A mask cut to its box: ``cover`` (h, w) uint8, 0..255, with its corner at (``x``, ``y``)."""

    x: int
    y: int
    cover: np.ndarray


@dataclass(frozen=True)
class Level:
    """An image (H, W, 3) uint8 RGB at one scale with its objects and, as one more patch list, the regions unknown."""

    image: np.ndarray
    objects: list[Patch]
    unknown: list[Patch]


class Pool:
    """Images to draw from, each at two scales (full, half), with a chance that its folder's weight decides.

    Args:
        levels: of every image.
        weights: of every image; None: all the same.
    """

    def __init__(self, levels: Sequence[tuple[Level, Level]] = (), weights: Sequence[float] | None = None):
        self.levels = list(levels)
        self._ends = None if weights is None else np.cumsum(np.asarray(weights, np.float64))

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> tuple[Level, Level]:
        return self.levels[index]

    def draw(self, rng: np.random.Generator) -> tuple[Level, Level]:
        """One image."""
        if self._ends is None:
            return self.levels[rng.integers(len(self.levels))]
        return self.levels[int(np.searchsorted(self._ends, rng.random() * self._ends[-1], side="right"))]


def load_pools(
    folder: str | Path | None, extra: Sequence[tuple[str | Path, float]] = (), hold_out: int = 32
) -> tuple[Pool, list[int]]:
    """Images of a COCO folder, of which some are held out, and of further ones, each image of those with a weight.

    Args:
        folder: its images have the weight 1; None: no real images.
        extra: (folder, weight > 0).
    Returns: the pool and the ids of the held-out images of ``folder``.
    """
    if folder is None:
        return Pool(), []
    levels, held = load_pool(folder, hold_out)
    weights = [1.0] * len(levels)
    for more, weight in extra:
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {more} must be positive, got {weight!r}: give a finite number")
        added, _ = load_pool(more, hold_out=0)
        levels, weights = [*levels, *added], [*weights, *[weight] * len(added)]
    return Pool(levels, weights if extra else None), held


def load_pool(
    folder: str | Path, hold_out: int = 32, longest: int = 640
) -> tuple[list[tuple[Level, Level]], list[int]]:
    """Decode a COCO folder (``instances.json``, ``images/``).

    ``hold_out`` images, chosen by a fixed seed, are left out. Each remaining one is kept at its own size (at most
    ``longest`` pixels) and at half of it; crowd regions count as unknown.

    Returns: levels (full, half) of each image that has an object, and the ids of the held-out images.
    """
    coco = read_coco(folder)
    ids = sorted(coco.imgs)
    if not 0 <= hold_out < len(ids):
        raise ValueError(f"`hold_out` must be in [0, {len(ids)}) for {folder}, got {hold_out}")
    held = sorted(ids[i] for i in np.random.default_rng(HOLD_OUT_SEED).permutation(len(ids))[:hold_out])
    pool = []
    for image_id in ids:
        if image_id in held:
            continue
        image = read_image(folder, coco.imgs[image_id]["file_name"])
        row = coco.imgs[image_id]
        if image.shape[:2] != (row["height"], row["width"]):
            continue
        annotations = [a for a in coco.loadAnns(coco.getAnnIds(image_id)) if a.get("segmentation")]
        check_masks(folder, row, annotations)
        masks = [(coco.annToMask(a).astype(bool), bool(a.get("iscrowd"))) for a in annotations]
        masks = [(mask, crowd) for mask, crowd in masks if mask.any()]
        if all(crowd for _, crowd in masks):
            continue
        scale = min(1.0, longest / max(image.shape[:2]))
        pool.append((_level(image, masks, scale), _level(image, masks, scale / 2)))
    logger.info(
        "%s: %d images, %d objects, %d images held out",
        folder,
        len(pool),
        sum(len(full.objects) for full, _ in pool),
        len(held),
    )
    return pool, held


def _level(image: np.ndarray, masks: list[tuple[np.ndarray, bool]], scale: float) -> Level:
    height, width = image.shape[:2]
    size = (round(width * scale), round(height * scale))

    def shrink(x: np.ndarray) -> np.ndarray:
        return x if scale == 1.0 else cv2.resize(x, size, interpolation=cv2.INTER_AREA)

    lists: tuple[list[Patch], list[Patch]] = ([], [])
    for mask, crowd in masks:
        cover = shrink(mask.astype(np.uint8) * 255)
        if cover.any():
            x0, y0, x1, y1 = box_of(cover > 0)
            lists[crowd].append(Patch(x0, y0, np.ascontiguousarray(cover[y0:y1, x0:x1])))
        else:  # keep both levels aligned: an object too small for this scale has an empty patch
            lists[crowd].append(Patch(0, 0, np.zeros((1, 1), np.uint8)))
    return Level(shrink(image), *lists)
