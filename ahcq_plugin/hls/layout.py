# SPDX-License-Identifier: Apache-2.0
"""How a matmul lies in the hardware: tiles of outputs, folds of inputs, the memory of scales.

A tile is ``pe`` outputs, which the processing elements compute at the same time; a fold is the ``simd`` inputs that
they take in one cycle. Every group of grouped channels begins with a fold of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import GroupedOperand, HLUQOperand, Matmul, SpecError, TableOperand
from ahcq_plugin.export.golden import dequant_constants, product_scale
from ahcq_plugin.hls.options import HLSOptions

MAX_WORD_BITS = 64  # a processing element's weights of one cycle are one C++ integer


@dataclass(frozen=True, eq=False)
class Layout:
    """See the module; made by ``lay_out``.

    Attributes:
        pe: processing elements, at most the number of outputs rounded up to ``out``.
        simd, out: as in the options.
        tiles, folds: how many.
        slots: int64 (folds * simd,): channel of each place of the fold order, -1 for padding.
        group_folds: folds of each group (one group unless the channels are grouped).
        read_beats: beats of a row that are read before its first fold leaves: all of them where channels are put in
            the order of their groups, else 0, for they are read while the first tile's folds leave.
        scales: float32, what the host writes through AXI4-Lite: left scales (of qk and av the product of both, for each
            head where they are per head), then for ``linear`` the weight scales, biases and, with hluq and table, the
            offsets of the N outputs.
        left_scales: how many of them belong to the left operand.
        has_offset: whether every output has an offset of its own, made of the left operand's offset.
    """

    pe: int
    simd: int
    out: int
    tiles: int
    folds: int
    slots: np.ndarray
    group_folds: tuple[int, ...]
    read_beats: int
    scales: np.ndarray
    left_scales: int
    has_offset: bool

    @property
    def stage_cycles(self) -> dict[str, int]:
        """Cycles that each stage of the pipeline takes for a row, the trip counts of its loops (II = 1).

        ``send`` (``rows.h``) repeats the row for every tile, ``multiply`` (``linear.h``, ``attention.h``) takes the
        folds, ``dequantize`` (``dequantize.h``) drains every group of every tile, ``out`` numbers a cycle.
        """
        steps = self.tiles * self.folds
        drained = self.tiles * len(self.group_folds) * (self.pe // self.out)
        return dict(send=self.read_beats + steps, multiply=steps, dequantize=drained)

    @property
    def row_cycles(self) -> int:
        """Cycles from row to row: those of the slowest stage, for all stages run at the same time."""
        return max(self.stage_cycles.values())


def lay_out(matmul: Matmul, options: HLSOptions) -> Layout:
    """The layout of ``matmul``; SpecError if its weights do not fit the words of memory, or it is a convolution with
    groups, for which there is no kernel.
    """
    if matmul.groups > 1:
        raise SpecError(
            f"matmul '{matmul.name}' is a convolution with {matmul.groups} groups: no kernel computes those, choose "
            "other layers"
        )
    if matmul.kind == "linear" and options.simd * matmul.right.bits > MAX_WORD_BITS:
        raise SpecError(
            f"matmul '{matmul.name}': `simd` {options.simd} times {matmul.right.bits}-bit weights is more than "
            f"{MAX_WORD_BITS} bits a cycle; use `simd` <= {MAX_WORD_BITS // matmul.right.bits}"
        )
    pe = min(options.pe, -(-matmul.n // options.out) * options.out)
    slots, group_folds = fold_slots(matmul, options.simd)
    left = _left_scales(matmul)
    has_offset = matmul.kind == "linear" and isinstance(matmul.left, HLUQOperand | TableOperand)
    parts = [left]
    if matmul.kind == "linear":
        parts += [matmul.right.scales, matmul.bias]
        if has_offset:
            parts.append(dequant_constants(matmul))
    return Layout(
        pe=pe,
        simd=options.simd,
        out=options.out,
        tiles=-(-matmul.n // pe),
        folds=len(slots) // options.simd,
        slots=slots,
        group_folds=group_folds,
        read_beats=-(-matmul.k // options.simd) if isinstance(matmul.left, GroupedOperand) else 0,
        scales=np.concatenate(parts).astype(np.float32),
        left_scales=len(left),
        has_offset=has_offset,
    )


def fold_slots(matmul: Matmul, simd: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """int64 channel of each place of the fold order, -1 for padding; and the folds of each group."""
    left = matmul.left
    order = left.permutation if isinstance(left, GroupedOperand) else np.arange(matmul.k)
    ends = left.boundaries[1:-1] if isinstance(left, GroupedOperand) else []
    groups = [np.pad(part, (0, -len(part) % simd), constant_values=-1) for part in np.split(order, ends)]
    return np.concatenate(groups), tuple(len(part) // simd for part in groups)


def _left_scales(matmul: Matmul) -> np.ndarray:
    left = matmul.left
    if matmul.kind != "linear":
        values = np.atleast_1d(product_scale(matmul))
    elif isinstance(left, GroupedOperand):
        values = left.scales
    elif isinstance(left, HLUQOperand):
        values = [left.scale_uniform, left.shift_scale]
    else:
        values = [left.unit if isinstance(left, TableOperand) else left.scale]
    return np.asarray(values, np.float32)
