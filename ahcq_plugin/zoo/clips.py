# SPDX-License-Identifier: Apache-2.0
"""Generated video clips with exact object masks: textured shapes that move in front of a moving background.

The surfaces and outlines are those of ``scenes.py``. Each object has a path, turns, grows or shrinks and, often, bends;
objects hide each other, leave the picture or come from outside, some have a twin that looks alike, some pieces belong
to nothing and only hide. All lengths scale with the picture. Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ahcq_plugin.zoo.scenes import clutter, paint_object, texture

#: Raised whenever the pictures change, so that folders written earlier are drawn again.
VERSION = 1
#: Objects of which the first frame shows a smaller share of the picture are not asked for.
MIN_AREA = 1 / 250


@dataclass(frozen=True)
class Sprite:
    """Something that can move: ``colour`` (h, w, 3) float32, ``cover`` (h, w) uint8 0..255, ``labelled`` or not."""

    colour: np.ndarray
    cover: np.ndarray
    labelled: bool = True


def render_clip(seed: int | tuple[int, ...], frames: int = 8, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw one clip.

    Args:
        seed: anything ``numpy.random.default_rng`` accepts; equal seeds give equal clips.
        frames: number of frames, at least 2. size: height and width in pixels, at least 32.

    Returns: frames (T, size, size, 3) uint8 RGB; masks (T, N, size, size) bool, N >= 1: the visible part of each
        object that the first frame shows, no two overlapping; empty where it is hidden or outside.
    """
    if frames < 2 or size < 32:
        raise ValueError(f"a clip needs at least 2 frames and 32 pixels, got {frames} and {size}")
    rng = np.random.default_rng(seed)
    while True:
        background = drawn_background(rng, size)
        sprites = []
        for _ in range(int(rng.integers(1, 6))):
            sprites.append(drawn_sprite(rng, size, rng.random() < 0.8, background))
            if rng.random() < 0.2:  # a twin
                sprites.append(Sprite(sprites[-1].colour, sprites[-1].cover, sprites[-1].labelled))
        images, labels = animate(rng, background, sprites, frames, size)
        names = [n for n in np.unique(labels[0]) if n and (labels[0] == n).mean() >= MIN_AREA]
        if names:
            return images, np.stack([labels == n for n in names], 1)


def drawn_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A surface with clutter and a few still shapes, (1.5 size, 1.5 size, 3) float32."""
    side = size * 3 // 2
    image = texture(rng, side, side, size)
    clutter(rng, image)
    unlabelled = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(0, 6))):
        paint_object(rng, image, unlabelled, 1)
    return image


def drawn_sprite(rng: np.random.Generator, size: int, labelled: bool, behind: np.ndarray) -> Sprite:
    """One object of ``scenes.paint_object``, drawn at about twice its later size."""
    side = 2 * size
    while True:
        canvas = np.empty((side, side, 3), np.float32)
        canvas[:] = behind.reshape(-1, 3)[rng.integers(behind.shape[0] * behind.shape[1])]
        labels = np.zeros((side, side), np.uint8)
        paint_object(rng, canvas, labels, 1)
        rows, columns = np.flatnonzero(labels.any(1)), np.flatnonzero(labels.any(0))
        if not len(rows) or min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == side - 1:
            continue  # cut off by the border, or nothing at all
        box = np.s_[rows[0] - 1 : rows[-1] + 2, columns[0] - 1 : columns[-1] + 2]
        return Sprite(canvas[box].copy(), labels[box] * np.uint8(255), labelled)


def animate(
    rng: np.random.Generator, background: np.ndarray, sprites: list[Sprite], frames: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Move a camera over the background and the sprites, back to front, over what it sees.

    Args: background (H, W, 3) float32, shown in reflection beyond its border.
    Returns: frames (T, size, size, 3) uint8; labels (T, size, size) uint8: 1 + index of the visible sprite, 0
        background or something unlabelled. A pixel belongs to a sprite that covers more than half of it.
    """
    images = np.empty((frames, size, size, 3), np.float32)
    labels = np.zeros((frames, size, size), np.uint8)
    height, width = background.shape[:2]
    camera = _motion(rng, frames, size, np.array([width, height]) / 2, rng.uniform(0.75, 1.1), calm=True)
    for t in range(frames):
        fit = max(size / height, size / width) * 1.2
        linear, middle = camera[t]
        matrix = np.concatenate([linear / fit, middle[:, None]], 1)
        matrix[:, 2] -= matrix[:, :2] @ [size / 2, size / 2]
        images[t] = cv2.warpAffine(
            background,
            matrix,
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
    for label, sprite in enumerate(sprites, 1):
        target = size * float(np.exp(rng.uniform(np.log(0.14), np.log(0.6))))
        colour, cover, scale = _shrink(sprite, target / max(sprite.cover.shape))
        centre = rng.uniform(0.1, 0.9, 2) * size
        path = _motion(rng, frames, size, centre, scale, calm=False)
        bend = _bending(rng, target, size) if rng.random() < 0.5 else None
        for t in range(frames):
            linear, middle = path[t]
            inverse = np.linalg.inv(linear)
            grid = _grid(size) if bend is None else _grid(size) + bend(t)
            source = (grid - middle.astype(np.float32)) @ inverse.T.astype(np.float32)
            source += (np.array(cover.shape[::-1], np.float32) - 1) / 2
            weight = cv2.remap(cover, source, None, cv2.INTER_LINEAR)
            if not weight.any():
                continue
            piece = cv2.remap(colour, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            images[t] += (weight.astype(np.float32) / 255)[..., None] * (piece - images[t])
            labels[t][weight > 127] = label if sprite.labelled else 0
    return _film(rng, images), labels


def _motion(
    rng: np.random.Generator, frames: int, size: int, centre: np.ndarray, scale: float, calm: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each frame a linear map (2, 2) and the place of the middle (2,), in pixels."""
    pace = 0.35 if calm else 1.0
    speed = pace * size * float(np.exp(rng.uniform(np.log(0.002), np.log(0.07))))
    heading, turn, angle = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.12), rng.uniform(-np.pi, np.pi)
    spin = rng.normal(0, 0.08 * pace)
    angle = angle * (0.05 if calm else 1.0)
    growth, sway = rng.normal(0, 0.035 * pace), rng.uniform(0, 0.15 * pace)
    phase, beat = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.2, 0.9, 2)
    out = []
    for t in range(frames):
        a = angle + spin * t
        stretch = sway * np.sin(beat[0] * t + phase[0])
        zoom = scale * np.exp(np.clip(growth * t, -0.7, 0.7))
        rotation = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        linear = zoom * rotation @ np.diag([np.exp(stretch), np.exp(-stretch)])
        out.append((linear, centre.astype(np.float64)))
        direction = heading + turn * t
        centre = centre + speed * (1 + 0.6 * np.sin(beat[1] * t + phase[1])) * np.array(
            [np.cos(direction), np.sin(direction)]
        )
    return out


def _bending(rng: np.random.Generator, target: float, size: int):
    """A wave that runs through an object: displacement (size, size, 2) float32 of each pixel in frame t."""
    wave = rng.normal(0, 1, 2)
    wave = (wave / np.linalg.norm(wave) * 2 * np.pi / (target * rng.uniform(0.6, 1.8))).astype(np.float32)
    strength = (rng.normal(0, 0.045, 2) * target).astype(np.float32)
    phase, beat = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.9)
    along = _grid(size) @ wave
    return lambda t: np.sin(along + np.float32(phase + beat * t))[..., None] * strength


def _grid(size: int) -> np.ndarray:
    line = np.arange(size, dtype=np.float32)
    return np.stack(np.broadcast_arrays(line[None], line[:, None]), -1)


def _shrink(sprite: Sprite, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Halve a sprite until the remaining scale is above 0.6: a linear warp alone would skip pixels."""
    colour, cover = sprite.colour, sprite.cover
    while scale < 0.6 and min(cover.shape) >= 8:
        colour, cover = (cv2.resize(a, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for a in (colour, cover))
        scale *= 2
    return colour, cover, scale


def _film(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Light that changes slowly, one blur for the clip, noise of its own in each frame; rounded to uint8."""
    size = images.shape[1]
    drift = rng.normal(0, 0.02) if rng.random() < 0.5 else 0.0
    blur = rng.uniform(0.4, 1.2) * size / 256 if rng.random() < 0.5 else 0.0
    noise = np.float32(rng.uniform(0, 8))
    out = np.empty(images.shape, np.uint8)
    for t, image in enumerate(images):
        image = image * np.float32(np.exp(np.clip(drift * t, -0.4, 0.4)))
        if blur:
            image = cv2.GaussianBlur(image, (0, 0), blur)
        image += rng.standard_normal(image.shape, np.float32) * noise
        out[t] = np.clip(np.rint(image), 0, 255)
    return out
