# SPDX-License-Identifier: Apache-2.0
"""Real images with instance masks, decoded once and kept in memory at two scales."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ahcq_plugin.zoo.items import read_coco, read_image
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
    held = sorted(int(i) for i in np.random.default_rng(HOLD_OUT_SEED).permutation(ids)[:hold_out])
    pool = []
    for image_id in ids:
        if image_id in held:
            continue
        image = read_image(folder, coco.imgs[image_id]["file_name"])
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        masks = [(coco.annToMask(a).astype(bool), bool(a.get("iscrowd"))) for a in annotations if a.get("segmentation")]
        masks = [(mask, crowd) for mask, crowd in masks if mask.shape == image.shape[:2] and mask.any()]
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
