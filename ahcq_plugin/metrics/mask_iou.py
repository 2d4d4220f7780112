# SPDX-License-Identifier: Apache-2.0
"""Intersection over union of masks, with one convention everywhere: two empty masks agree, so theirs is 1."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

Masks = TypeVar("Masks", np.ndarray, Tensor)


def mask_iou(first: Masks, second: Masks) -> Masks:
    """Intersection over union of each pair of masks.

    Args: first, second: bool (..., H, W), both arrays or both tensors, of one shape.
    Returns: (...) in [0, 1]; float64 for arrays, float32 for tensors, on their device.
    Raises: ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"masks to compare must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return iou_of_areas((first & second).sum((-2, -1)), (first | second).sum((-2, -1)))


def iou_of_areas(intersection, union):
    """``intersection / union``, 1 where the union is empty: integer numbers, arrays or tensors of pixel counts."""
    empty = union == 0
    return (intersection + empty) / (union + empty)
