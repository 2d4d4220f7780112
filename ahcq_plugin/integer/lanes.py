# SPDX-License-Identifier: Apache-2.0
"""What a left operand brings to a matmul: lanes of columns, each a table of digits, and float constants.

The order of integers and floats is that of ``export.golden``, which also gives all constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export.golden import lane_operands
from ahcq_plugin.export.matmul import lane_names
from ahcq_plugin.export.operands import Activation, GroupedOperand, HLUQOperand, TableOperand, top
from ahcq_plugin.integer.digits import Digits, safe_length, split


@dataclass(frozen=True, eq=False)
class Lane:
    """One accumulator.

    Attributes:
        begin, end: its columns, of the reordered channels.
        digits: of the operand of each code.
        scale: float32 that its sum is multiplied with.
    """

    begin: int
    end: int
    digits: Digits
    scale: np.float32

    def passes(self, right_top: int) -> Iterator[Pass]:
        """The 8-bit products that make the lane's sum, each proved to fit int32.

        Args:
            right_top: the greatest absolute value of a right operand.
        """
        for factor, table, largest in zip(self.digits.factors, self.digits.tables, self.digits.tops(), strict=True):
            length = safe_length(largest, right_top)
            for begin in range(self.begin, self.end, length):
                yield Pass(begin, min(begin + length, self.end), table, int(factor))


@dataclass(frozen=True, eq=False)
class Pass:
    """One product in int32: ``factor * sum over [begin, end) of table[code] * right``."""

    begin: int
    end: int
    table: np.ndarray
    factor: int

    @property
    def top(self) -> int:
        """The largest left operand."""
        return int(self.table.max(initial=0))


def make_lanes(left: Activation, k: int) -> tuple[Lane, ...]:
    """The lanes of an operand with k columns, in the order in which their products are added up."""
    codes = np.arange(top(left.bits) + 1)
    if isinstance(left, GroupedOperand):
        ends = zip(left.boundaries[:-1], left.boundaries[1:], left.scales, strict=True)
        return tuple(Lane(int(begin), int(end), split(codes), scale) for begin, end, scale in ends)
    scales = {
        HLUQOperand: lambda: (left.scale_uniform, left.shift_scale),
        TableOperand: lambda: (left.unit,),
    }.get(type(left), lambda: (left.scale,))()
    values = lane_operands(left, codes) if isinstance(left, HLUQOperand | TableOperand) else [codes]
    assert len(values) == len(lane_names(left))
    return tuple(Lane(0, k, split(table), scale) for table, scale in zip(values, scales, strict=True))


def product_count(left: Activation, k: int, right_top: int) -> int:
    """How many 8-bit products of all k columns a matmul takes: multiplications in units of m * n * k."""
    return sum(p.end - p.begin for lane in make_lanes(left, k) for p in lane.passes(right_top)) // k
