# SPDX-License-Identifier: Apache-2.0
"""Operand quantizers of an exported matmul: codes, tables and scales, nothing that needs a logarithm (numpy only).

Codes are integers in [0, 2^bits - 1]. What a code stands for (float32, one rounding a step):

=========== ==================================================================================================
uniform     ``(code - zero_point) * scale``
per_head    the same with the scale and zero point of the head (operands of attention)
grouped     the same with the scale and zero point of the channel's group (CAG)
hluq        ``offset + scale_log * 2^-code`` below L, ``offset`` at L, ``offset + scale_log + (code - L) *
            scale_uniform`` above
table       ``offset + table[code] * unit`` (LNQ, AGQ, power of two)
weight      ``(code - zero_point[n]) * scale[n]`` of output channel n
=========== ==================================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MIN_BITS, MAX_BITS = 2, 8
MAX_LOG_LEVELS = 16
#: Largest entry of a decode table: 30 fraction bits and the value 1.
MAX_TABLE_ENTRY = 2**30


class SpecError(ValueError):
    """A spec that cannot be right; says what, got, allowed."""


@dataclass(frozen=True, eq=False)
class UniformOperand:
    """Uniform, per tensor.

    Attributes:
        bits: 2..8.
        scale: float32 > 0.
        zero_point: integer in [0, 2^bits - 1], the code of the value 0.
    """

    bits: int
    scale: np.float32
    zero_point: int

    family = "uniform"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_scalar("scale", self.scale, positive=True)
        check_int("zero_point", self.zero_point, 0, top(self.bits))


@dataclass(frozen=True, eq=False)
class PerHeadOperand:
    """Uniform per head of attention: q, k, v or attention weights.

    The products of a matmul are counted over all leading axes in C order, heads last: product i is of head ``i % H``.

    Attributes:
        bits: 2..8.
        scales: float32 (H,) > 0.
        zero_points: int64 (H,) in [0, 2^bits - 1].
    """

    bits: int
    scales: np.ndarray
    zero_points: np.ndarray

    family = "per_head"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if check_array("scales", self.scales, np.float32) == 0:
            raise SpecError("`scales` must have one value for each head, got none")
        check_grids(self, self.heads)

    @property
    def heads(self) -> int:
        """H."""
        return len(self.scales)


@dataclass(frozen=True, eq=False)
class GroupedOperand:
    """Uniform per group of channels (CAG); the channels are the K axis of the matmul.

    Attributes:
        bits: 2..8.
        permutation: int64 (K,): position i of the reordered channels holds channel ``permutation[i]``.
        boundaries: int64 (G + 1,): group g has the positions ``boundaries[g]`` to ``boundaries[g + 1] - 1``.
        scales: float32 (G,) > 0.
        zero_points: int64 (G,) in [0, 2^bits - 1].
    """

    bits: int
    permutation: np.ndarray
    boundaries: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    family = "grouped"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        channels = check_array("permutation", self.permutation, np.int64)
        if channels == 0 or not np.array_equal(np.sort(self.permutation), np.arange(channels)):
            raise SpecError(f"`permutation` must hold each of 0..{channels - 1} once, got {_shown(self.permutation)}")
        groups = check_array("boundaries", self.boundaries, np.int64) - 1
        ends = (int(self.boundaries[0]), int(self.boundaries[-1])) if groups >= 1 else None
        if ends != (0, channels) or not (np.diff(self.boundaries) > 0).all():
            raise SpecError(
                f"`boundaries` must ascend strictly from 0 to {channels}, the number of channels, got "
                f"{_shown(self.boundaries)}"
            )
        check_grids(self, groups)

    @property
    def channels(self) -> int:
        """K."""
        return len(self.permutation)

    @property
    def groups(self) -> int:
        """G."""
        return len(self.scales)

    def labels(self) -> np.ndarray:
        """int64 (K,): the group of each channel, in the channels' original order."""
        labels = np.empty(self.channels, np.int64)
        labels[self.permutation] = np.repeat(np.arange(self.groups), np.diff(self.boundaries))
        return labels


@dataclass(frozen=True, eq=False)
class HLUQOperand:
    """Hybrid log-uniform, per tensor.

    Attributes:
        bits: 2..8.
        offset: float32.
        scale_log, scale_uniform: float32 > 0.
        log_levels: L, 1..min(16, 2^bits - 2).
        boundaries: float32 (2^bits - 1,), ascending: what a quantizer compares x with (``rank_codes`` gives the code).
    """

    bits: int
    offset: np.float32
    scale_log: np.float32
    scale_uniform: np.float32
    log_levels: int
    boundaries: np.ndarray

    family = "hluq"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_scalar("offset", self.offset)
        check_scalar("scale_log", self.scale_log, positive=True)
        check_scalar("scale_uniform", self.scale_uniform, positive=True)
        check_int("log_levels", self.log_levels, 1, min(MAX_LOG_LEVELS, 2**self.bits - 2))
        check_thresholds(self.boundaries, self.bits)

    @property
    def shift_scale(self) -> np.float32:
        """``scale_log * 2^-(L - 1)``: what one unit of the shift lane is worth."""
        return np.float32(np.ldexp(self.scale_log, 1 - self.log_levels))

    @property
    def rank_codes(self) -> np.ndarray:
        """int64 (2^bits,): code of each rank, the rank of x being the number of boundaries <= x."""
        rank = np.arange(2**self.bits)
        split = self.log_levels
        return np.where(rank == 0, split, np.where(rank <= split, split - rank, rank))


@dataclass(frozen=True, eq=False)
class TableOperand:
    """Levels from an integer decode table, per tensor: LNQ, AGQ, power of two.

    Attributes:
        bits: 2..8.
        boundaries: float32 (2^bits - 1,), ascending: what a quantizer compares x with.
        rank_codes: int64 (2^bits,): code of each rank, the rank of x being the number of boundaries <= x.
        table: int64 (2^bits,) in [0, 2^30]: the integer of each code.
        unit: float32 > 0.
        offset: float32.
    """

    bits: int
    boundaries: np.ndarray
    rank_codes: np.ndarray
    table: np.ndarray
    unit: np.float32
    offset: np.float32

    family = "table"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_thresholds(self.boundaries, self.bits)
        count = 2**self.bits
        check_array("rank_codes", self.rank_codes, np.int64, (count,))
        if not np.array_equal(np.sort(self.rank_codes), np.arange(count)):
            raise SpecError(f"`rank_codes` must hold each of 0..{count - 1} once, got {_shown(self.rank_codes)}")
        check_array("table", self.table, np.int64, (count,))
        check_range("table", self.table, 0, MAX_TABLE_ENTRY)
        if not (np.diff(self.table[self.rank_codes]) >= 0).all():
            raise SpecError(f"`table` must not descend from rank to rank, got {_shown(self.table[self.rank_codes])}")
        check_scalar("unit", self.unit, positive=True)
        check_scalar("offset", self.offset)


@dataclass(frozen=True, eq=False)
class WeightOperand:
    """A constant weight, uniform and asymmetric per output channel.

    Attributes:
        bits: 2..8.
        codes: int64 (N, K) in [0, 2^bits - 1], channels in the layer's own order.
        scales: float32 (N,) > 0.
        zero_points: int64 (N,) in [0, 2^bits - 1].
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    family = "weight"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not isinstance(self.codes, np.ndarray) or self.codes.dtype != np.int64 or self.codes.ndim != 2:
            raise SpecError(f"`codes` of a weight must be int64 (N, K), got {_kind(self.codes)}")
        if not self.codes.size:
            raise SpecError(f"`codes` of a weight must not be empty, got {self.codes.shape}")
        check_range("codes", self.codes, 0, top(self.bits))
        check_grids(self, len(self.codes))

    def signed(self) -> np.ndarray:
        """int64 (N, K) ``codes - zero_points``: the operand of the multipliers, bits + 1 bits signed."""
        return self.codes - self.zero_points[:, None]


Activation = UniformOperand | PerHeadOperand | GroupedOperand | HLUQOperand | TableOperand
Operand = Activation | WeightOperand
OPERANDS: dict[str, type] = {
    kind.family: kind
    for kind in (UniformOperand, GroupedOperand, HLUQOperand, TableOperand, PerHeadOperand, WeightOperand)
}


def of_products(values: np.ndarray | np.float32 | int, leading: tuple[int, ...]) -> np.ndarray:
    """One value, or one for each head (H,), shaped to broadcast against (*leading, m, k): a value for each product.

    Raises:
        SpecError: the number of products is no multiple of the number of heads.
    """
    values = np.asarray(values)
    if values.ndim == 0:
        return values
    products = int(np.prod(leading, dtype=np.int64))
    if products % len(values):
        raise SpecError(f"{products} products (leading axes {leading}) cannot be shared out to {len(values)} heads")
    return np.tile(values, products // len(values)).reshape(*leading, 1, 1)


def top(bits: int) -> int:
    """The largest code, 2^bits - 1."""
    return 2**bits - 1


def check_bits(bits: int) -> None:
    """SpecError unless ``bits`` is an integer in [2, 8]."""
    check_int("bits", bits, MIN_BITS, MAX_BITS)


def check_int(name: str, value: int, least: int, most: int) -> None:
    """SpecError unless ``value`` is a Python integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SpecError(f"`{name}` must be an integer in [{least}, {most}], got {value!r}")


def check_grids(operand: PerHeadOperand | GroupedOperand | WeightOperand, count: int) -> None:
    """Raise SpecError unless ``scales`` and ``zero_points`` are those of ``count`` uniform grids."""
    check_array("scales", operand.scales, np.float32, (count,))
    check_positive("scales", operand.scales)
    check_array("zero_points", operand.zero_points, np.int64, (count,))
    check_range("zero_points", operand.zero_points, 0, top(operand.bits))


def check_scalar(name: str, value: np.float32, positive: bool = False) -> None:
    """SpecError unless ``value`` is a finite np.float32, and a positive one where asked."""
    if not isinstance(value, np.float32) or not math.isfinite(value) or (positive and value <= 0):
        kind = "a positive finite" if positive else "a finite"
        raise SpecError(f"`{name}` must be {kind} float32, got {value!r}")


def check_array(name: str, value: np.ndarray, dtype: type, shape: tuple[int, ...] | None = None) -> int:
    """Length of a one-dimensional array; SpecError for another dtype or shape."""
    right = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == 1
    if not right or (shape is not None and value.shape != shape):
        wanted = f"{np.dtype(dtype).name} {shape if shape else 'of one dimension'}"
        raise SpecError(f"`{name}` must be {wanted}, got {_kind(value)}")
    return len(value)


def check_positive(name: str, values: np.ndarray) -> None:
    """SpecError unless all values are finite and positive."""
    if not (np.isfinite(values) & (values > 0)).all():
        raise SpecError(f"`{name}` must be positive and finite, got {_shown(values)}")


def check_range(name: str, values: np.ndarray, least: int, most: int) -> None:
    """SpecError unless all values lie in [least, most]."""
    if values.size and (values.min() < least or values.max() > most):
        raise SpecError(f"`{name}` must lie in [{least}, {most}], got [{values.min()}, {values.max()}]")


def check_thresholds(boundaries: np.ndarray, bits: int) -> None:
    """SpecError unless ``boundaries`` are 2^bits - 1 finite float32 in ascending order (equal ones are allowed)."""
    check_array("boundaries", boundaries, np.float32, (top(bits),))
    if not np.isfinite(boundaries).all():
        raise SpecError(f"`boundaries` must be finite, got {_shown(boundaries)}")
    wrong = np.flatnonzero(np.diff(boundaries) < 0)
    if len(wrong):
        at = int(wrong[0])
        raise SpecError(
            f"`boundaries` must ascend, got {boundaries[at]!s} before {boundaries[at + 1]!s} at {at}: sort the "
            "thresholds and their codes together"
        )


def _shown(values: np.ndarray) -> str:
    return np.array2string(np.asarray(values), threshold=16, edgeitems=4, separator=", ").replace("\n", "")


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name} {value.shape}"
    return f"{type(value).__name__} {value!r:.40}"
