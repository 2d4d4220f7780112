# SPDX-License-Identifier: Apache-2.0
"""The measures of video object segmentation: J, the IoU of masks, and F, of boundaries (Perazzi et al., 2016).

As the public benchmarks of DAVIS-2017 and SA-V compute them: the first and the last annotated frame do not count; an
object counts from the first remaining frame in which the truth or the prediction shows it; one that the truth never
shows there does not count; a sequence's objects are averaged over frames, then all objects of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ahcq_plugin.metrics.mask_iou import mask_iou

BOUND = 0.008  # share of the picture's diagonal by which a boundary may be off


@dataclass(frozen=True)
class JF:
    """Means over the frames of one object, in [0, 1]."""

    j: float
    f: float


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool that differ from the one to the right, below or diagonally below right.

    Beyond the picture there is nothing to differ from.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray, bound: float = BOUND) -> float:
    """F: harmonic mean of precision and recall of boundary pixels, matched within a disk.

    The disk's radius is ``bound`` times the diagonal, rounded up, in pixels. 1 when neither has a boundary.
    """
    ours, theirs = boundary(mask), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    radius = int(np.ceil(bound * np.hypot(*mask.shape)))
    line = np.arange(-radius, radius + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.uint8)
    precision = (ours & _dilate(theirs, disk)).sum() / ours.sum()
    recall = (theirs & _dilate(ours, disk)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _dilate(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), disk).astype(bool)


def score_object(masks: np.ndarray, truth: np.ndarray) -> JF | None:
    """J and F of one object.

    Args: masks, truth: (T, H, W) bool, the frames that count.
    Returns: None when ``truth`` never shows the object.
    """
    if masks.shape != truth.shape:
        raise ValueError(f"masks and truth must have one shape, got {masks.shape} and {truth.shape}")
    if not truth.any():
        return None
    start = int(np.argmax((masks | truth).any((1, 2))))
    masks, truth = masks[start:], truth[start:]
    return JF(
        float(mask_iou(masks, truth).mean()),
        float(np.mean([boundary_accuracy(m, t) for m, t in zip(masks, truth, strict=True)])),
    )


def score_sequence(masks: np.ndarray, truth: np.ndarray, skip_ends: bool = True) -> list[JF | None]:
    """``score_object`` of every object.

    Args: masks, truth: (T, N, H, W) bool, all annotated frames; the first and last are left out with ``skip_ends``.
    Raises: ValueError when no frame is left.
    """
    if len(masks) != len(truth):
        raise ValueError(f"as many frames on both sides, got {len(masks)} and {len(truth)}")
    if skip_ends:
        masks, truth = masks[1:-1], truth[1:-1]
    if not len(truth):
        raise ValueError("no annotated frame is left to measure: the first and the last one do not count")
    return [score_object(masks[:, n], truth[:, n]) for n in range(truth.shape[1])]
