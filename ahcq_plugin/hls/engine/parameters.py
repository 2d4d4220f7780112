# SPDX-License-Identifier: Apache-2.0
"""The piece of memory beside a descriptor: strides, groups, table, scales, quantizers, and the numbers of each tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ahcq_plugin.export.golden import dequant_constants, product_scale
from ahcq_plugin.export.matmul import Matmul, heads_of, lane_starts, zeros_of
from ahcq_plugin.export.operands import GroupedOperand, HLUQOperand, TableOperand, WeightOperand
from ahcq_plugin.export.thresholds import rank_keys, relu_keys
from ahcq_plugin.hls.engine.config import CHUNKS, LANES, PES
from ahcq_plugin.hls.engine.destination import Destination


def group_sizes(matmul: Matmul) -> np.ndarray:
    """int64 (G,): how many channels each group of the left operand has; all k in one unless they are grouped."""
    return np.diff(matmul.left.boundaries) if isinstance(matmul.left, GroupedOperand) else np.array([matmul.k])


def parameter_words(matmul: Matmul, destination: Destination, groups: int) -> np.ndarray:
    """uint32 (words,): all parts in the order in which the engine reads them, whole beats each.

    ``groups``: of passes, of HLUQ without shift lanes two over the same codes.
    """
    sizes = group_sizes(matmul)
    parts = [destination.strides.header(), _beats(sizes if len(sizes) == groups else np.repeat(sizes, groups))]
    if isinstance(matmul.left, TableOperand):
        parts.append(_beats(matmul.left.table))
    parts.append(_lanes(matmul, destination.shorts, groups))
    if destination.quantizers:
        parts += _quantizers(destination)
    if isinstance(matmul.right, WeightOperand):
        parts.append(_tiles(matmul, groups))
    return np.concatenate([part.ravel() for part in parts])


def _beats(values: np.ndarray) -> np.ndarray:
    """The values, each a word, padded to whole beats."""
    return np.pad(np.asarray(values, np.int64), (0, -len(values) % LANES)).astype(np.int32).view(np.uint32)


def _float_words(values: np.ndarray | Sequence[np.float32]) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def _lanes(matmul: Matmul, unscaled: bool, groups: int) -> np.ndarray:
    """A beat for each group or head: left zero point, right zero point (of heads), one or two scales.

    ``unscaled``: the scale of products is 1.
    """
    left = matmul.left
    if isinstance(matmul.right, WeightOperand):
        beats = np.zeros((groups, LANES), np.uint32)
        if isinstance(left, GroupedOperand):
            beats[:, 2] = _float_words(left.scales)
        elif isinstance(left, HLUQOperand) and groups == 2:
            beats[:, 2] = _float_words([left.scale_uniform, left.shift_scale])
        elif isinstance(left, HLUQOperand):
            beats[:, 2], beats[:, 3] = _float_words([left.scale_uniform]), _float_words([left.shift_scale])
        else:
            beats[:, 2] = _float_words([left.unit if isinstance(left, TableOperand) else left.scale])
        return beats
    beats = np.zeros((heads_of(left, matmul.right), LANES), np.uint32)
    beats[:, 0], beats[:, 1] = zeros_of(left), zeros_of(matmul.right)
    beats[:, 2] = (
        _float_words(np.ones(1, np.float32)) if unscaled else _float_words(np.atleast_1d(product_scale(matmul)))
    )
    return beats


def _quantizers(destination: Destination) -> list[np.ndarray]:
    """Keys (the first of each quantizer unused), codes of the ranks, and the quantizer of each chunk of columns."""
    tables = [rank_keys(quantizer) for quantizer in destination.quantizers]
    keys = np.concatenate([np.concatenate([[0], keys]) for keys, _ in tables])
    if destination.activation == "relu":
        keys = relu_keys(keys)
    return [_beats(keys), _beats(np.concatenate([codes for _, codes in tables])), _beats(destination.selector)]


def _tiles(matmul: Matmul, groups: int) -> np.ndarray:
    """uint32 (tiles, beats, 8): zero points, low and high words of each group's starts, scales, biases, offsets."""
    left, right = matmul.left, matmul.right
    assert isinstance(right, WeightOperand)  # run-time operands have no tiles of parameters
    starts = lane_starts(left, right)[:, :groups].T
    has_offset = isinstance(left, HLUQOperand | TableOperand)
    offset = dequant_constants(matmul) if has_offset else np.zeros(matmul.n, np.float32)
    columns = [right.zero_points.astype(np.uint32)]
    for start in np.ascontiguousarray(starts):
        columns += [(start & 0xFFFFFFFF).astype(np.uint32), (start >> 32 & 0xFFFFFFFF).astype(np.uint32)]
    columns += [_float_words(values) for values in (right.scales, matmul.bias, offset)]
    padded = np.pad(np.stack(columns), ((0, 0), (0, -matmul.n % PES)))
    return padded.reshape(len(columns), -1, CHUNKS, LANES).swapaxes(0, 1)
