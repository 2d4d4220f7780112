# SPDX-License-Identifier: Apache-2.0
"""Training clips: shapes of ``clips.py``, and photographs as background with cut-outs and shapes that move over them.

Sample ``i`` of a run depends on (seed, ``i``) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.studies.training.pool import Pool
from ahcq_plugin.studies.training.samples import recolour
from ahcq_plugin.zoo.clips import MIN_AREA, Sprite, animate, drawn_background, drawn_sprite
from ahcq_plugin.zoo.scenes import box_of


@dataclass(frozen=True)
class ClipSampleCfg:
    """What a clip looks like. ``scene_share``: probability of a clip without photographs."""

    size: int = 128  # side of the model's input, pixels
    frames: int = 4
    objects: int = 3  # asked for in each clip, some of them twice where there are fewer
    scene_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.scene_share <= 1:
            raise ValueError(f"`scene_share` must be in [0, 1], got {self.scene_share!r}")
        if self.frames < 2 or self.objects < 1:
            raise ValueError(f"at least 2 frames and 1 object are needed, got {self.frames!r} and {self.objects!r}")


def make_clip(seed: int, index: int, cfg: ClipSampleCfg, pool: Pool) -> dict[str, Tensor]:
    """Sample ``index``.

    Returns a dict of
        frames (T, 3, S, S) uint8;
        targets (N, T, S, S) bool: what is visible of N objects that the first frame shows;
        boxes (N, 4) float32: slightly wrong boxes in the first frame, xyxy in pixels;
        labels (T, S/2, S/2) int16: 0 no object, 1.. objects, -2 no object but unlabelled things possible;
        extents (T, 4, S/4, S/4) float32: distance in pixels to the left, top, right and bottom of the box of the
        object that a pixel belongs to, -1 where there is none.
    """
    rng = np.random.default_rng((seed, index))
    size = cfg.size
    while True:
        real = bool(pool) and rng.random() >= cfg.scene_share
        background = pool.draw(rng)[1].image.astype(np.float32) if real else drawn_background(rng, size)
        sprites = []
        for _ in range(int(rng.integers(1, 6))):
            labelled = rng.random() < 0.8
            if pool and rng.random() < (0.7 if real else 0.15):
                sprites.append(_cut_out(rng, pool, labelled))
            else:
                sprites.append(drawn_sprite(rng, size, labelled, background))
            if rng.random() < 0.2:
                sprites.append(Sprite(sprites[-1].colour, sprites[-1].cover, labelled))
        frames, labels = animate(rng, background, sprites, cfg.frames, size)
        names = [n for n in np.unique(labels[0]) if n and (labels[0] == n).mean() >= MIN_AREA]
        if names:
            break
    if real:
        colours = int(rng.integers(2**62))
        frames = np.stack([recolour(np.random.default_rng(colours), frame) for frame in frames])
    return _finish(rng, frames, labels, names, real, cfg)


def _cut_out(rng: np.random.Generator, pool: Pool, labelled: bool) -> Sprite:
    """An object of a photograph, large ones more often."""
    while True:
        level = pool.draw(rng)[0]
        patch = max((level.objects[i] for i in rng.integers(0, len(level.objects), 3)), key=lambda p: p.cover.size)
        height, width = patch.cover.shape
        if min(height, width) >= 16:
            colour = level.image[patch.y : patch.y + height, patch.x : patch.x + width].astype(np.float32)
            flip = np.s_[:, ::-1] if rng.random() < 0.5 else np.s_[:]
            return Sprite(np.ascontiguousarray(colour[flip]), np.ascontiguousarray(patch.cover[flip]), labelled)


def _finish(
    rng: np.random.Generator, frames: np.ndarray, labels: np.ndarray, names: list[int], real: bool, cfg: ClipSampleCfg
) -> dict[str, Tensor]:
    count = len(names)
    chosen = rng.permutation(count) if count >= cfg.objects else np.arange(cfg.objects) % count
    names = np.array(names)[chosen[: cfg.objects]]
    boxes = np.array([box_of(labels[0] == n) for n in names], np.float32)
    sides = np.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, 1)
    spread = np.where(rng.random((cfg.objects, 1)) < 0.3, 0.06, 0.01)
    boxes = np.clip(boxes + rng.standard_normal(boxes.shape) * spread * sides, 0, cfg.size)
    return {
        "frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),
        "targets": torch.from_numpy(np.stack([labels == n for n in names])),
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(
            np.where(labels[:, ::2, ::2] == 0, -2 if real else 0, labels[:, ::2, ::2]).astype(np.int16)
        ),
        "extents": torch.from_numpy(np.stack([_extents(frame) for frame in labels])),
    }


def _extents(labels: np.ndarray) -> np.ndarray:
    """(4, S/4, S/4) float32 of a label map (S, S)."""
    coarse = labels[::4, ::4]
    out = np.full((4, *coarse.shape), -1, np.float32)
    centre = np.arange(len(coarse), dtype=np.float32) * 4 + 0.5
    x, y = np.broadcast_to(centre[None], coarse.shape), np.broadcast_to(centre[:, None], coarse.shape)
    for name in np.unique(coarse[coarse > 0]):
        x0, y0, x1, y1 = box_of(labels == name)
        here = coarse == name
        out[:, here] = np.stack([x[here] - x0, y[here] - y0, x1 - x[here], y1 - y[here]])
    return out
