# SPDX-License-Identifier: Apache-2.0
"""How a matmul lies in the hardware: tiles of outputs, folds of inputs, words of weights, the memory of scales.

A tile is ``lanes`` outputs, which the processing elements compute at the same time; a fold is the ``simd`` inputs that
they take in one cycle. Every group of grouped channels begins with a fold of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import GroupedOperand, HLUQOperand, Matmul, SpecError, TableOperand
from ahcq_plugin.export.golden import dequant_constants, product_scale
from ahcq_plugin.export.matmul import lane_starts
from ahcq_plugin.hls.options import HLSOptions

MAX_WORD_BITS = 64  # a processing element's weights of one cycle are one C++ integer


@dataclass(frozen=True, eq=False)
class Layout:
    """See the module; made by ``lay_out``.

    Attributes:
        lanes: processing elements, at most the number of outputs rounded up to ``out``.
        simd, out: as in the options.
        tiles, folds: how many.
        slots: int64 (folds * simd,): channel of each place of the fold order, -1 for padding.
        group_folds: folds of each group (one group unless the channels are grouped).
        scales: float32, what the host writes through AXI4-Lite: left scales, then for ``linear`` the weight scales,
            biases and, with hluq and table, the offsets of the N outputs.
        left_scales: how many of them belong to the left operand.
    """

    lanes: int
    simd: int
    out: int
    tiles: int
    folds: int
    slots: np.ndarray
    group_folds: tuple[int, ...]
    scales: np.ndarray
    left_scales: int


def lay_out(matmul: Matmul, options: HLSOptions) -> Layout:
    """The layout of ``matmul``; SpecError if its weights do not fit the words of memory."""
    if matmul.kind == "linear" and options.simd * matmul.right.bits > MAX_WORD_BITS:
        raise SpecError(
            f"matmul '{matmul.name}': `simd` {options.simd} times {matmul.right.bits}-bit weights is more than "
            f"{MAX_WORD_BITS} bits a cycle; use `simd` <= {MAX_WORD_BITS // matmul.right.bits}"
        )
    lanes = min(options.lanes, -(-matmul.n // options.out) * options.out)
    slots, group_folds = _slots(matmul, options.simd)
    left = _left_scales(matmul)
    parts = [left]
    if matmul.kind == "linear":
        parts += [matmul.right.scales, matmul.bias]
        if has_offset(matmul):
            parts.append(dequant_constants(matmul))
    return Layout(
        lanes=lanes,
        simd=options.simd,
        out=options.out,
        tiles=-(-matmul.n // lanes),
        folds=len(slots) // options.simd,
        slots=slots,
        group_folds=group_folds,
        scales=np.concatenate(parts).astype(np.float32),
        left_scales=len(left),
    )


def has_offset(matmul: Matmul) -> bool:
    """Whether every output has an offset of its own, made of the left operand's offset."""
    return matmul.kind == "linear" and isinstance(matmul.left, HLUQOperand | TableOperand)


def weight_words(matmul: Matmul, layout: Layout) -> np.ndarray:
    """uint64 (tiles * folds, lanes): ``simd`` codes each, code i at bit i * bits; padding holds the zero point."""
    bits, right = matmul.right.bits, matmul.right
    codes = np.zeros((layout.tiles * layout.lanes, layout.folds * layout.simd), np.uint64)
    padded = np.concatenate([right.codes, right.zero_points[:, None]], axis=1)  # slot -1 is the last column
    codes[: matmul.n] = padded[:, layout.slots]
    shifts = (np.arange(layout.simd) * bits).astype(np.uint64)
    words = (codes.reshape(layout.tiles, layout.lanes, layout.folds, layout.simd) << shifts).sum(-1, dtype=np.uint64)
    return words.transpose(0, 2, 1).reshape(layout.tiles * layout.folds, layout.lanes)


def zero_points(matmul: Matmul, layout: Layout) -> np.ndarray:
    """int64 (tiles, lanes) of the weights; 0 beyond the outputs."""
    return _by_lane(matmul.right.zero_points[:, None], layout)[:, 0]


def starts(matmul: Matmul, layout: Layout) -> np.ndarray:
    """int64 (tiles * groups, lanes): what each accumulator starts with; of hluq, whose lanes run together, zeros."""
    groups = len(layout.group_folds)
    return _by_lane(lane_starts(matmul.left, matmul.right)[:, :groups], layout).reshape(-1, layout.lanes)


def _by_lane(values: np.ndarray, layout: Layout) -> np.ndarray:
    """(n, groups) to (tiles, groups, lanes)."""
    padded = np.zeros((layout.tiles * layout.lanes, values.shape[1]), np.int64)
    padded[: len(values)] = values
    return padded.reshape(layout.tiles, layout.lanes, -1).transpose(0, 2, 1)


def _slots(matmul: Matmul, simd: int) -> tuple[np.ndarray, tuple[int, ...]]:
    left = matmul.left
    order = left.permutation if isinstance(left, GroupedOperand) else np.arange(matmul.k)
    ends = left.boundaries[1:-1] if isinstance(left, GroupedOperand) else []
    groups = [np.pad(part, (0, -len(part) % simd), constant_values=-1) for part in np.split(order, ends)]
    return np.concatenate(groups), tuple(len(part) // simd for part in groups)


def _left_scales(matmul: Matmul) -> np.ndarray:
    left = matmul.left
    if matmul.kind != "linear":
        values = [product_scale(matmul)]
    elif isinstance(left, GroupedOperand):
        values = left.scales
    elif isinstance(left, HLUQOperand):
        values = [left.scale_uniform, left.shift_scale]
    else:
        values = [left.unit if isinstance(left, TableOperand) else left.scale]
    return np.asarray(values, np.float32)
