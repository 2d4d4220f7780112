# SPDX-License-Identifier: Apache-2.0
"""Training samples: generated scenes, augmented real images, and mixtures of both.

Sample ``i`` of a run depends on (seed, ``i``) alone, so a resumed run and a run on several processes see the data of
an uninterrupted one without any random state to save.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.studies.training.pool import Level, Patch, Pool
from ahcq_plugin.zoo.scenes import box_of, paint_object, render_scene

PIXEL_MEAN = (124, 116, 104)  # rounded mean of SAM's normalisation: what zero padding looks like before it
MIN_COVER = 8 * 255  # objects that show fewer pixels at the model's input are not asked for


@dataclass(frozen=True)
class SampleCfg:
    """What a sample looks like. Shares are probabilities in [0, 1]."""

    size: int = 256  # side of the model's input, pixels
    mask_size: int = 128  # side of its mask logits, pixels
    boxes: int = 8
    scene_share: float = 0.5  # the rest are real images
    paste_share: float = 0.35  # of all images: cut-outs and shapes added on top
    whole_share: float = 0.35  # of real images: shown whole, as in an evaluation

    def __post_init__(self) -> None:
        for name in ("scene_share", "paste_share", "whole_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)!r}")
        if self.boxes < 1:
            raise ValueError(f"`boxes` must be at least 1, got {self.boxes!r}")
        if self.mask_size % 4 or self.size % self.mask_size:
            raise ValueError(
                f"`mask_size` must be a multiple of 4 and divide `size`, got {self.mask_size!r} and {self.size!r}"
            )


def make_sample(seed: int, index: int, cfg: SampleCfg, pool: Pool) -> dict[str, Tensor]:
    """Sample ``index``: see the module text.

    Returns a dict of
        image (3, S, S) uint8;
        boxes (N, 4) float32, xyxy in input pixels, slightly wrong;
        targets (N, M, M) uint8, covered share of each pixel of the mask x 255;
        labels (M, M) int16: 0 no object, 1.. objects, -1 unknown, -2 no object but unlabelled things possible;
        extents (4, M/2, M/2) float32: distance in input pixels from a pixel to the left, top, right and bottom of
        the box of the object it belongs to, -1 where there is none.
    """
    rng = np.random.default_rng((seed, index))
    while True:
        real = bool(pool) and rng.random() >= cfg.scene_share
        if real:
            image, covers, unknown = _real(rng, pool.draw(rng), cfg)
        else:
            image, masks = render_scene(int(rng.integers(2**62)), cfg.size)
            covers = [mask.astype(np.uint8) * 255 for mask in masks]
            unknown = np.zeros(image.shape[:2], np.uint8)
        if rng.random() < cfg.paste_share:
            image, covers = _paste(rng, image, covers, pool, real)
        covers = [cover for cover in covers if int(cover.sum(dtype=np.int64)) >= MIN_COVER]
        if covers:
            break
    if real:
        image = recolour(rng, image)
    return _finish(rng, image, covers, unknown, real, cfg)


def _real(
    rng: np.random.Generator, levels: tuple[Level, Level], cfg: SampleCfg
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """A real image, whole or zoomed in on an object, through one affine map."""
    full, size = levels[0], cfg.size
    height, width = full.image.shape[:2]
    base = size / max(height, width)
    if rng.random() < cfg.whole_share:
        scale = base * (1.0 if rng.random() < 0.6 else rng.uniform(0.8, 1.1))
        matrix = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]])
        flip_width = width * scale
    else:
        patch = full.objects[rng.integers(len(full.objects))]
        longest = max(patch.cover.shape)
        side = float(np.exp(rng.uniform(np.log(24), np.log(190)))) * size / 256
        scale = float(np.clip(side / longest, 0.8 * base, max(2.0, 2 * base)))
        aspect = float(np.exp(rng.uniform(-0.15, 0.15)))
        angle = np.deg2rad(rng.uniform(-12, 12)) if rng.random() < 0.4 else 0.0
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = turn @ np.diag([scale * aspect, scale / aspect])
        middle = np.array([patch.x + patch.cover.shape[1] / 2, patch.y + patch.cover.shape[0] / 2])
        # the object's middle goes anywhere that shows no border, or, where the image is smaller, all of the image
        ends = np.stack([middle * scale, size - (np.array([width, height]) - middle) * scale])
        target = np.clip(rng.uniform(0.2, 0.8, 2) * size, ends.min(0), ends.max(0))
        matrix = np.concatenate([linear, (target - linear @ middle)[:, None]], 1)
        flip_width = size
    if rng.random() < 0.5:
        matrix[0] = -matrix[0]
        matrix[0, 2] += flip_width - 1
    level = levels[0]
    if scale < 0.6:  # half-size copy: x_full = 2 x_half + 0.5
        level = levels[1]
        matrix = np.concatenate([matrix[:, :2] * 2, matrix[:, 2:] + 0.5 * matrix[:, :2].sum(1, keepdims=True)], 1)
    image = cv2.warpAffine(
        level.image,
        matrix,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=PIXEL_MEAN,
    )
    unknown = np.zeros((size, size), np.uint8)
    for patch in level.unknown:
        unknown |= _warp_patch(patch, matrix, size)
    return image, [_warp_patch(patch, matrix, size) for patch in level.objects], unknown


def _warp_patch(patch: Patch, matrix: np.ndarray, size: int) -> np.ndarray:
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ np.array([patch.x, patch.y])
    return cv2.warpAffine(patch.cover, moved, (size, size), flags=cv2.INTER_LINEAR)


def _paste(
    rng: np.random.Generator, image: np.ndarray, covers: list[np.ndarray], pool: Pool, real: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Put one to four real cut-outs or generated shapes (some filled with a piece of a real image) in front."""
    size = len(image)
    canvas = image.astype(np.float32)
    for _ in range(int(rng.integers(1, 5))):
        if pool and (rng.random() < 0.6 or not real):
            piece, cover = _cut_out(rng, pool.draw(rng)[0], size)
        else:
            labels = np.zeros((size, size), np.uint8)
            piece = canvas.copy()
            paint_object(rng, piece, labels, 1)
            cover = labels * 255
            if pool and rng.random() < 0.5:
                other = pool.draw(rng)[1].image
                piece = cv2.resize(other, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        weight = cover.astype(np.float32)[..., None] / 255
        canvas += weight * (piece - canvas)
        covers = [np.minimum(below, 255 - cover) for below in covers] + [cover]
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), covers


def _cut_out(rng: np.random.Generator, level: Level, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An object of a real image, scaled, turned and moved: (S, S, 3) float32 and its cover (S, S) uint8."""
    patch = max((level.objects[i] for i in rng.integers(0, len(level.objects), 3)), key=lambda p: p.cover.size)
    height, width = patch.cover.shape
    side = float(np.exp(rng.uniform(np.log(24), np.log(150)))) * size / 256
    scale = min(1.5, side / max(height, width))
    angle = np.deg2rad(rng.uniform(-30, 30)) if rng.random() < 0.5 else 0.0
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if rng.random() < 0.5:
        linear[:, 0] *= -1
    shift = rng.uniform(0.05, 0.95, 2) * size - linear @ [width / 2, height / 2]
    matrix = np.concatenate([linear, shift[:, None]], 1)
    piece = level.image[patch.y : patch.y + height, patch.x : patch.x + width]
    cover = patch.cover
    while scale < 0.6 and min(cover.shape) >= 8:  # a linear warp alone would skip pixels
        piece, cover = (cv2.resize(a, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for a in (piece, cover))
        scale, matrix = scale * 2, np.concatenate([matrix[:, :2] * 2, matrix[:, 2:]], 1)
    warped = cv2.warpAffine(piece, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    warped = warped.astype(np.float32) * rng.uniform(0.8, 1.2) + rng.normal(0, 10, 3).astype(np.float32)
    return warped, cv2.warpAffine(cover, matrix, (size, size), flags=cv2.INTER_LINEAR)


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation, tint; sometimes grey, mixed-up channels, blur or noise."""
    x = image.astype(np.float32)
    x = x * rng.uniform(0.7, 1.3) + rng.uniform(-20, 20) + rng.normal(0, 8, 3).astype(np.float32)
    grey = x.mean(2, keepdims=True)
    x = grey + (x - grey) * (0.0 if rng.random() < 0.07 else rng.uniform(0.5, 1.5))
    if rng.random() < 0.15:
        x = x[..., rng.permutation(3)]
    if rng.random() < 0.15:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.2:
        x = x + rng.standard_normal(x.shape, np.float32) * np.float32(rng.uniform(1, 8))
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _finish(
    rng: np.random.Generator,
    image: np.ndarray,
    covers: list[np.ndarray],
    unknown: np.ndarray,
    real: bool,
    cfg: SampleCfg,
) -> dict[str, Tensor]:
    step = cfg.size // cfg.mask_size
    small = [cv2.resize(cover, (cfg.mask_size, cfg.mask_size), interpolation=cv2.INTER_AREA) for cover in covers]
    tight = np.stack([soft_box(cover) for cover in covers])
    labels = np.full((cfg.mask_size, cfg.mask_size), -2 if real else 0, np.int16)
    labels[unknown[::step, ::step] > 127] = -1
    for i in np.argsort([-int(cover.sum(dtype=np.int64)) for cover in covers]):  # small objects on top of large ones
        labels[small[i] > 127] = i + 1
    coarse = labels[::2, ::2]
    centre = (np.arange(len(coarse), dtype=np.float32) + 0.5) * 2 * step
    sides = tight[np.maximum(coarse, 1) - 1].transpose(2, 0, 1)
    extents = np.stack(
        [centre[None] - sides[0], centre[:, None] - sides[1], sides[2] - centre[None], sides[3] - centre[:, None]]
    )
    extents = np.where(coarse[None] > 0, np.maximum(extents, 0), -1).astype(np.float32)
    count = len(covers)
    chosen = rng.permutation(count) if count >= cfg.boxes else np.arange(cfg.boxes) % count
    chosen = chosen[: cfg.boxes]
    boxes = tight[chosen]
    spread = np.where(rng.random((cfg.boxes, 1)) < 0.3, 0.06, 0.01)
    sides = np.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, 1)
    boxes = np.clip(boxes + rng.standard_normal(boxes.shape) * spread * sides, 0, cfg.size).astype(np.float32)
    return {
        "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        "boxes": torch.from_numpy(boxes),
        "targets": torch.from_numpy(np.stack([small[i] for i in chosen])),
        "labels": torch.from_numpy(labels),
        "extents": torch.from_numpy(extents),
    }


def soft_box(cover: np.ndarray) -> np.ndarray:
    """Box (4,) float32 xyxy of a cover (H, W) uint8, finer than a pixel: a border pixel counts as far as covered."""
    x0, y0, x1, y1 = box_of(cover > 24) if (cover > 24).any() else box_of(cover > 0)
    part = cover[y0:y1, x0:x1]
    edge = 1 - np.array([part[:, 0].max(), part[0].max(), part[:, -1].max(), part[-1].max()], np.float32) / 255
    return np.array([x0, y0, x1, y1], np.float32) + edge * np.array([1, 1, -1, -1], np.float32)
