# SPDX-License-Identifier: Apache-2.0
"""What the memories of a layer with a constant weight hold, in the order in which its processing elements read them."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export.matmul import lane_starts
from ahcq_plugin.export.operands import WeightOperand
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.layout import Layout


def weight_words(layer: Layer) -> np.ndarray:
    """uint64 (tiles * folds, pe): ``simd`` codes each, code i at bit i * bits; padding holds the zero point."""
    layout, right = layer.layout, layer.matmul.right
    codes = np.zeros((layout.tiles * layout.pe, layout.folds * layout.simd), np.uint64)
    padded = np.concatenate([right.codes, right.zero_points[:, None]], axis=1)  # slot -1 is the last column
    codes[: layer.matmul.n] = padded[:, layout.slots]
    shifts = (np.arange(layout.simd) * right.bits).astype(np.uint64)
    words = (codes.reshape(layout.tiles, layout.pe, layout.folds, layout.simd) << shifts).sum(-1, dtype=np.uint64)
    return words.transpose(0, 2, 1).reshape(layout.tiles * layout.folds, layout.pe)


def zero_points(layer: Layer) -> np.ndarray:
    """int64 (tiles, pe) of the weights; 0 beyond the outputs."""
    return _by_tile(layer.matmul.right.zero_points[:, None], layer.layout)[:, 0]


def starts(layer: Layer) -> np.ndarray:
    """int64 (tiles * groups, pe): what each accumulator starts with; of hluq, whose lanes run together, zeros."""
    matmul, layout = layer.matmul, layer.layout
    groups = len(layout.group_folds)
    assert isinstance(matmul.right, WeightOperand)  # a layer without one has no memories of weights
    return _by_tile(lane_starts(matmul.left, matmul.right)[:, :groups], layout).reshape(-1, layout.pe)


def _by_tile(values: np.ndarray, layout: Layout) -> np.ndarray:
    """(n, groups) to (tiles, groups, pe)."""
    padded = np.zeros((layout.tiles * layout.pe, values.shape[1]), np.int64)
    padded[: len(values)] = values
    return padded.reshape(layout.tiles, layout.pe, -1).transpose(0, 2, 1)
