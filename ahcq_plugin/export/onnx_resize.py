# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing of arrays as PyTorch does it, in numpy."""

from __future__ import annotations

import numpy as np


def resize_bilinear(x: np.ndarray, size: tuple[int, int], antialias: bool = False) -> np.ndarray:
    """(..., h, w) float32 to (..., H, W), half-pixel centres, as ``torch.nn.functional.interpolate``."""
    weigh = _antialiased if antialias else _weights
    rows, columns = (weigh(old, new) for old, new in zip(x.shape[-2:], size, strict=True))
    return rows @ x @ columns.T


def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) float32: the share of every old pixel in a new one, at most two of them."""
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(place.astype(int), old - 1)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - (place - low))
    np.add.at(weights, (np.arange(new), np.minimum(low + 1, old - 1)), place - low)
    return weights


def _antialiased(old: int, new: int) -> np.ndarray:
    """(new, old) float32: a triangle as wide as a new pixel, or as an old one where these are larger."""
    width = max(old / new, 1.0)
    centre = (np.arange(new) + 0.5)[:, None] * (old / new)
    distance = np.abs(np.arange(old)[None] + 0.5 - centre) / width
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
