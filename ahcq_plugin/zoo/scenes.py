# SPDX-License-Identifier: Apache-2.0
"""Generated images with exact instance masks: the data set that needs no download.

A scene is a textured, cluttered background and 3 to 14 overlapping objects, painted from back to front: ellipses,
boxes, polygons, stars, blobs, rings, bent strokes, blobs with limbs and objects of several parts. Colour, gradient,
smooth and fine noise, stripes and checks are drawn for each part, so a border is sometimes an edge in colour and
sometimes only a change of texture; some objects are close in colour to what lies behind them, some cast a shadow,
some are crossed by thin unlabelled wires. At the end come uneven light, blur and noise. All lengths scale with the
image. Everything follows from the seed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

from ahcq_plugin.support.files import check_name, read_json

#: Raised whenever the pictures change, so that folders written earlier are drawn again.
VERSION = 1
#: Objects with a smaller visible share of the image stay in the picture, unlabelled.
MIN_AREA = 1 / 500

Part = tuple[list[np.ndarray], list[np.ndarray]]  # outlines (n, 2) in pixels: filled ones, holes


def render_scene(
    seed: int | tuple[int, ...], size: int = 256, min_area: float = MIN_AREA
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw one scene.

    Args:
        seed: anything ``numpy.random.default_rng`` accepts; equal seeds give equal scenes.
        size: height and width in pixels, at least 32.
        min_area: smallest visible share of the image for a mask to be returned.

    Returns: image (size, size, 3) uint8 RGB; masks, each (size, size) bool: the visible part of one object, no two
        overlapping, back to front, possibly none.
    """
    if size < 32:
        raise ValueError(f"`size` must be at least 32 pixels, got {size}")
    rng = np.random.default_rng(seed)
    image = texture(rng, size, size, size)
    clutter(rng, image)
    labels = np.zeros((size, size), np.uint8)
    count = int(rng.integers(3, 15))
    for label in range(1, count + 1):
        paint_object(rng, image, labels, label)
    if rng.random() < 0.2:
        _wires(rng, image, labels)
    image = _develop(rng, image)
    masks = [labels == label for label in range(1, count + 1)]
    return image, [mask for mask in masks if mask.sum() >= min_area * size * size]


def texture(rng: np.random.Generator, height: int, width: int, size: int) -> np.ndarray:
    """A random surface, (height, width, 3) float32 around 0..255; ``size`` sets the grain: the side of the image."""
    out = np.empty((height, width, 3), np.float32)
    colour = rng.uniform(8, 247, 3)
    out[:] = colour.mean() + (colour - colour.mean()) * rng.uniform(0.15, 1.0)
    kinds = rng.random(5) < (0.65, 0.55, 0.5, 0.15, 0.1)
    x = (np.arange(width, dtype=np.float32) - width / 2) / size
    y = (np.arange(height, dtype=np.float32)[:, None] - height / 2) / size
    turn = rng.uniform(0, 2 * np.pi)
    along = np.cos(turn) * x + np.sin(turn) * y
    if kinds[0]:  # gradient, steeper on small objects
        steep = rng.normal(0, 60, 3) * rng.uniform(0.5, 1.0) * size / max(height, width)
        out += along[..., None] * steep.astype(np.float32)
    if kinds[1]:
        out += _smooth_noise(
            rng, height, width, max(2, round(rng.uniform(3, 9) * max(height, width) / size)), rng.uniform(4, 24), 3
        )
    if kinds[2]:
        cells = max(2, round(rng.uniform(24, 110) * max(height, width) / size))
        out += _smooth_noise(rng, height, width, cells, rng.uniform(4, 20), 1)
    if kinds[3] or kinds[4]:
        waves = rng.uniform(5, 36) * 2 * np.pi
        pattern = np.sin(waves * along)
        if kinds[4]:
            pattern = pattern * np.sin(waves * rng.uniform(0.5, 1.5) * (np.cos(turn) * y - np.sin(turn) * x))
        if rng.random() < 0.5:
            pattern = np.sign(pattern)
        out += pattern[..., None] * rng.normal(0, 26, 3).astype(np.float32)
    return out


def paint_object(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray, label: int) -> None:
    """Draw one random object onto ``image`` (S, S, 3) float32 and write ``label`` where it covers ``labels``.

    A pixel belongs to the object when more than half of it is covered.
    """
    size = len(labels)
    radius = size * float(np.exp(rng.uniform(np.log(0.055), np.log(0.38))))
    centre = rng.uniform(0, size, 2)
    parts = _parts(rng, radius)
    shadow, faint, rim = rng.random() < 0.2, rng.random() < 0.15, rng.random() < 0.12
    shared = rng.random() < 0.4
    surface_seed = None
    for filled, holes in parts:
        points = np.concatenate(filled) + centre
        x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 2, 0)
        x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 3, size)
        if x1 - x0 < 2 or y1 - y0 < 2:
            continue
        offset = centre - (x0, y0)
        alpha = np.zeros((y1 - y0, x1 - x0), np.uint8)
        for outlines, value in ((filled, 255), (holes, 0)):
            for outline in outlines:
                cv2.fillPoly(alpha, [np.round((outline + offset) * 16).astype(np.int32)], value, cv2.LINE_AA, 4)
        area = image[y0:y1, x0:x1]
        if surface_seed is None or not shared:
            surface_seed = int(rng.integers(2**32))
        surface = texture(np.random.default_rng(surface_seed), y1 - y0, x1 - x0, size)
        if faint:  # little contrast: close to the colour of what lies below
            below = area.reshape(-1, 3).mean(0)
            surface = 0.35 * surface + (0.65 * below + rng.normal(0, 10, 3)).astype(np.float32)
        if rim:
            inside = cv2.erode(alpha, np.ones((3, 3), np.uint8), iterations=max(1, size // 200), borderValue=255)
            surface *= np.where(inside > 127, 1.0, 0.6).astype(np.float32)[..., None]
        if shadow:
            soft = cv2.GaussianBlur(alpha, (0, 0), max(1.0, 0.08 * radius)).astype(np.float32) / 255
            reach = max(1, round(0.12 * radius))
            area[reach:] *= 1 - 0.4 * soft[:-reach, :, None]
        weight = alpha.astype(np.float32)[..., None] / 255
        area += weight * (surface - area)
        labels[y0:y1, x0:x1][alpha > 127] = label


def _parts(rng: np.random.Generator, radius: float) -> list[Part]:
    """Outlines of one object around the origin, in painting order."""
    kind = rng.random()
    if kind < 0.16:  # several joined parts, each with a surface of its own
        parts, at = [], np.zeros(2)
        for _ in range(int(rng.integers(2, 4))):
            small = radius * rng.uniform(0.4, 0.75)
            parts.append(([_outline(rng, small) + at], []))
            at = at + rng.normal(0, 0.55, 2) * small
        return parts
    if kind < 0.30:  # a body with limbs
        body = _outline(rng, 0.6 * radius)
        limbs = [
            _stroke(rng, radius * rng.uniform(0.8, 1.3), radius * rng.uniform(0.06, 0.16))
            for _ in range(int(rng.integers(1, 5)))
        ]
        return [([body, *limbs], [])]
    if kind < 0.40:
        return [([_stroke(rng, 2 * radius, radius * rng.uniform(0.06, 0.25), centred=True)], [])]
    outline = _outline(rng, radius)
    holes = [outline * rng.uniform(0.35, 0.7)] if rng.random() < 0.1 else []
    return [([outline], holes)]


def _outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A closed curve of about the given radius around the origin, (n, 2)."""
    aspect = float(np.exp(rng.uniform(-0.7, 0.7)))
    turn = rng.uniform(0, 2 * np.pi)
    kind = int(rng.integers(0, 6))
    if kind == 0:  # ellipse
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        length = np.ones(48)
    elif kind == 1:  # box, often upright
        angle, length = np.pi / 4 + np.arange(4) * np.pi / 2, np.ones(4)
        turn = 0.0 if rng.random() < 0.5 else turn
    elif kind == 2:  # polygon
        corners = int(rng.integers(3, 9))
        angle, length = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(0.6, 1.2, corners)
    elif kind == 3:  # star
        corners = 2 * int(rng.integers(4, 9))
        angle, length = np.arange(corners) * 2 * np.pi / corners, np.ones(corners)
        length[1::2] = rng.uniform(0.35, 0.7)
    else:  # blob
        angle, length = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.ones(64)
        for wave in range(2, 7):
            length += rng.normal(0, 0.45 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        length = length.clip(0.2, 2.0)
    points = np.stack([np.cos(angle) * aspect, np.sin(angle) / aspect], 1) * (radius * length)[:, None]
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _stroke(rng: np.random.Generator, length: float, half_width: float, centred: bool = False) -> np.ndarray:
    """A bent bar that starts at the origin (or has its middle there), (32, 2)."""
    t = np.linspace(0, 1, 16)
    angle = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.9) * t + rng.normal(0, 0.5) * np.sin(np.pi * t)
    step = np.stack([np.cos(angle), np.sin(angle)], 1)
    line = np.cumsum(step, 0) * length / len(t)
    if centred:
        line = line - line.mean(0)
    side = np.stack([-step[:, 1], step[:, 0]], 1) * (max(half_width, 1.0) * (1 - rng.uniform(0, 0.6) * t))[:, None]
    return np.concatenate([line + side, (line - side)[::-1]])


def _smooth_noise(
    rng: np.random.Generator, height: int, width: int, cells: int, strength: float, channels: int
) -> np.ndarray:
    """A grid of random values, about ``cells`` along the longer side, enlarged smoothly."""
    longest = max(height, width)
    rows, cols = max(2, round(cells * height / longest)), max(2, round(cells * width / longest))
    grid = rng.standard_normal((rows, cols, channels), np.float32) * np.float32(strength)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)


def clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Specks and lines on the background that belong to nothing."""
    size = len(image)
    for _ in range(int(rng.integers(0, 25)) if rng.random() < 0.6 else 0):
        at = rng.uniform(0, size, 2)
        if rng.random() < 0.5:
            outline = _outline(rng, size * rng.uniform(0.004, 0.02))
        else:
            outline = _stroke(rng, size * rng.uniform(0.03, 0.4), size * rng.uniform(0.002, 0.006))
        cv2.fillPoly(
            image, [np.round((outline + at) * 16).astype(np.int32)], rng.uniform(0, 255, 3).tolist(), cv2.LINE_8, 4
        )


def _wires(rng: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> None:
    """Thin bars in front of everything; what they hide is no longer visible."""
    size = len(labels)
    for _ in range(int(rng.integers(1, 4))):
        bar = np.round(
            (
                _stroke(rng, size * rng.uniform(0.4, 1.2), size * rng.uniform(0.004, 0.012), centred=True)
                + rng.uniform(0, size, 2)
            )
            * 16
        ).astype(np.int32)
        cv2.fillPoly(image, [bar], rng.uniform(0, 255, 3).tolist(), cv2.LINE_8, 4)
        cv2.fillPoly(labels, [bar], 0, cv2.LINE_8, 4)


def _develop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light, blur, noise and rounding to uint8."""
    size = len(image)
    if rng.random() < 0.3:
        image *= 1 + _smooth_noise(rng, size, size, 3, 0.15, 1)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2) * size / 256)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 10))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box x0, y0, x1, y1 of a bool mask (H, W) with at least one pixel; x1 and y1 are one past the last."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Exact COCO run lengths (uncompressed, column by column, starting with zeros) of a bool mask (H, W)."""
    flat = np.concatenate([[False], mask.flatten(order="F"), [False]])
    change = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], change, [mask.size]]))
    if len(change) and change[-1] == mask.size:  # the mask ends with a one: no closing run of zeros
        runs = runs[:-1]
    return {"counts": runs.tolist(), "size": list(mask.shape)}


def write_coco(out_dir: str | os.PathLike[str], count: int, seed: int = 0, size: int = 256) -> Path:
    """Write ``count`` scenes as a COCO data set: ``images/000000.png`` … and ``instances.json``.

    Scene ``i`` is ``render_scene((seed, i), size)``. One category, ``object``; masks exact, as uncompressed run
    lengths. The folder appears only when complete; one written earlier with the same arguments is used again.

    Returns: path of ``instances.json``.
    Raises: FileExistsError when ``out_dir`` holds anything else.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    out_dir = Path(out_dir)
    check_name(out_dir)
    made_by = {"description": "generated scenes", "version": VERSION, "seed": seed, "size": size, "count": count}
    result = out_dir / "instances.json"
    if _made_by(result) == made_by:
        return result
    if out_dir.exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} holds other files than the scenes asked for: choose another or delete it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        data = _write_images(partial, count, seed, size)
        (partial / "instances.json").write_text(json.dumps({"info": made_by, **data}), encoding="utf-8")
        partial.chmod(0o755)
        try:
            if out_dir.exists():
                out_dir.rmdir()
            partial.rename(out_dir)
        except OSError:
            if _made_by(result) != made_by:  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _made_by(result: Path) -> dict | None:
    content = read_json(result, "delete the folder, and it is made again") if result.is_file() else None
    return content.get("info") if isinstance(content, dict) else None


def _write_images(folder: Path, count: int, seed: int, size: int) -> dict[str, list]:
    (folder / "images").mkdir()
    images, annotations = [], []
    for index in range(count):
        image, masks = render_scene((seed, index), size)
        name = f"{index:06d}.png"
        if not cv2.imwrite(str(folder / "images" / name), image[..., ::-1]):
            raise OSError(f"cannot write {folder / 'images' / name}")
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for mask in masks:
            x0, y0, x1, y1 = box_of(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "segmentation": encode_rle(mask),
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
