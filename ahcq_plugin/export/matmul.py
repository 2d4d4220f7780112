# SPDX-License-Identifier: Apache-2.0
"""One exported matmul: its kind, shape and operands, and how wide its accumulators must be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export.operands import (
    Activation,
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    UniformOperand,
    WeightOperand,
    check_array,
    check_int,
    top,
)

Right = WeightOperand | UniformOperand | PerHeadOperand
Families = tuple[type[Activation | WeightOperand], ...]
#: kind -> families that its left and its right operand may have.
KINDS: dict[str, tuple[Families, Families]] = {
    "linear": ((UniformOperand, GroupedOperand, HLUQOperand, TableOperand), (WeightOperand,)),
    "qk": ((UniformOperand, PerHeadOperand), (UniformOperand, PerHeadOperand)),
    "av": ((UniformOperand, PerHeadOperand, TableOperand), (UniformOperand, PerHeadOperand)),
}
MAX_ACCUMULATOR_BITS = 63


class Unsupported(SpecError):
    """Operands that may be right in themselves, but that no matmul of this kind can have."""


@dataclass(frozen=True)
class Patches:
    """How the rows of a convolution's matmul are made: ``channels * kernel[0] * kernel[1]`` values in this order.

    With groups a row is as many parts of ``k`` values; output n reads part ``n // (N / groups)``.

    Attributes:
        channels: input channels.
        kernel, stride, padding: (vertical, horizontal); padding is filled with the left zero point.
        groups: 1, or a divisor of the channels and of the outputs; as many as channels in a depthwise convolution.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int = 1

    def __post_init__(self) -> None:
        check_int("channels", self.channels, 1, 2**20)
        check_int("groups", self.groups, 1, self.channels)
        if self.channels % self.groups:
            raise SpecError(f"`groups` must divide the {self.channels} channels, got {self.groups}")
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise SpecError(f"`{name}` must be a pair (vertical, horizontal), got {pair!r}")
            for value in pair:
                check_int(name, value, least, 1024)


@dataclass(frozen=True, eq=False)
class Matmul:
    """A matrix product with quantized operands.

    ``linear``: (m, k) codes times a constant weight (n, k), plus bias. ``qk``: ``batch`` products (m, k) x (n, k)
    transposed. ``av``: ``batch`` products (m, k) x (k, n).

    Attributes:
        name: of the node in the unit's graph; unique in the unit.
        kind: ``linear``, ``qk`` or ``av``.
        layer: name of the Linear or Conv2d in the unit, "" for qk and av.
        batch, m, k, n: shape with one image and one prompt; k and n are fixed, more data means more batch or m. k
            counts the products of one output: of a convolution with groups a row has ``row_length`` = groups * k codes.
        left, right: operands.
        bias: float32 (n,), zeros for a layer without bias; None for qk and av.
        accumulator_bits: width (signed) that every integer register of the matmul fits in, see ``accumulator_range``.
        patches: of a convolution, else None.
    """

    name: str
    kind: str
    layer: str
    batch: int
    m: int
    k: int
    n: int
    left: Activation
    right: Right
    bias: np.ndarray | None
    accumulator_bits: int
    patches: Patches | None = None

    @property
    def groups(self) -> int:
        """Of a convolution, else 1."""
        return 1 if self.patches is None else self.patches.groups

    @property
    def row_length(self) -> int:
        """Codes of a row of the left operand."""
        return self.groups * self.k

    def __post_init__(self) -> None:
        try:
            self._check()
        except SpecError as error:
            raise type(error)(f"matmul '{self.name}': {error}") from None

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}")
        check_supported(self.kind, self.left, self.right, self.patches)
        for name in ("batch", "m", "k", "n"):
            check_int(name, getattr(self, name), 1, 2**31)
        if self.kind == "linear":
            self._check_linear()
        elif self.bias is not None or self.patches is not None or self.layer:
            raise SpecError(f"kind {self.kind} has no layer, no bias and no patches")
        else:
            check_heads(self.left, self.right, self.batch)
        if isinstance(self.left, GroupedOperand) and self.left.channels != self.k:
            raise SpecError(f"the left operand has {self.left.channels} channels, `k` is {self.k}")
        check_int("accumulator_bits", self.accumulator_bits, 2, MAX_ACCUMULATOR_BITS)
        lo, hi = accumulator_range(self.left, self.right, self.k)
        needed = signed_bits(lo, hi)
        if self.accumulator_bits < needed:
            raise SpecError(
                f"`accumulator_bits` is {self.accumulator_bits}, too narrow: values from {lo} to {hi} need {needed}"
            )

    def _check_linear(self) -> None:
        if self.right.codes.shape != (self.n, self.k):
            raise SpecError(f"the weight has shape {self.right.codes.shape}, `n`, `k` are {(self.n, self.k)}")
        check_array("bias", self.bias, np.float32, (self.n,))
        if not np.isfinite(self.bias).all():
            raise SpecError("`bias` must be finite; look for NaN in the model")
        if self.batch != 1:
            raise SpecError(f"`batch` of kind linear must be 1, got {self.batch}")
        if self.patches is None:
            return
        wanted = self.patches.channels * self.patches.kernel[0] * self.patches.kernel[1]
        if wanted != self.row_length:
            groups = "" if self.groups == 1 else f" in {self.groups} groups"
            raise SpecError(f"`patches` make rows of {wanted}{groups}, `k` is {self.k}")
        if self.n % self.groups:
            raise SpecError(f"`groups` must divide the {self.n} outputs, got {self.groups}")


def heads_of(left: Activation, right: Right) -> int:
    """How many heads have parameters of their own; 1 where none has."""
    return max([1, *(operand.heads for operand in (left, right) if isinstance(operand, PerHeadOperand))])


def check_heads(left: Activation, right: Right, batch: int) -> None:
    """Raises SpecError unless both operands that are per head have as many heads, and ``batch`` a multiple of them."""
    heads = heads_of(left, right)
    for side, operand in (("left", left), ("right", right)):
        if isinstance(operand, PerHeadOperand) and operand.heads != heads:
            raise SpecError(f"the {side} operand has {operand.heads} heads, the other {heads}")
    if batch % heads:
        raise SpecError(f"`batch` must be a multiple of the {heads} heads, got {batch}")


def check_supported(kind: str, left: Activation, right: Right, patches: Patches | None) -> None:
    """Raises Unsupported for operands that a matmul of this kind cannot have."""
    for side, operand, allowed in zip(("left", "right"), (left, right), KINDS[kind], strict=True):
        if not isinstance(operand, allowed):
            families = ", ".join(item.family for item in allowed)
            got = getattr(operand, "family", type(operand).__name__)
            raise Unsupported(f"the {side} operand of kind {kind} must be one of {families}, got {got}")
    if kind == "av" and isinstance(left, TableOperand) and left.offset != 0:
        raise Unsupported(f"the table of kind av must have the offset 0, got {left.offset!s}; use the family agq")
    if patches is not None and not isinstance(left, UniformOperand):
        raise Unsupported(f"the left operand of a convolution must be uniform, got {left.family}")


def signed_bits(lo: int, hi: int) -> int:
    """Least width, at least 2, of a two's complement register for all integers from ``lo`` to ``hi``."""
    return max(2, (max(hi, 0)).bit_length() + 1, (-min(lo, 0) - 1).bit_length() + 1 if lo < 0 else 0)


def accumulator_range(left: Activation, right: Right, k: int) -> tuple[int, int]:
    """Least and greatest value that any integer register of the matmul can hold, at any time, in any order of the k.

    With a constant weight: every lane of every output starts at its folded constant (``lane_starts``) and adds
    ``u * w`` with 0 <= u <= the lane's largest operand and w the signed weight; at most all its positive or all its
    negative products are in the sum. The bounds are attained. With two run-time operands: the product of the
    unsigned operands, the sums of their rows times the other's zero point, and the corrections one after the other
    (see ``golden``), of the head where they reach furthest.
    """
    if isinstance(right, WeightOperand):
        return _constant_range(left, right)
    (a,), b, heads = lane_tops(left), top(right.bits), heads_of(left, right)
    ends = []
    for zero_a, zero_b in zip(*(np.broadcast_to(zeros_of(o), heads).tolist() for o in (left, right)), strict=True):
        # a*b - zero_b*a - zero_a*b is bilinear: its least value lies in a corner of the codes' range
        ends.append(min(0, -zero_b * a, -zero_a * b, a * b - zero_b * a - zero_a * b))
        ends.append(max(a * b, zero_b * a, zero_a * b))
    return k * min(ends), k * max(ends)


def _constant_range(left: Activation, right: WeightOperand) -> tuple[int, int]:
    weights = right.signed()
    lo = hi = 0
    starts = lane_starts(left, right)
    for lane, (part, largest) in enumerate(zip(lane_slices(left, weights), lane_tops(left), strict=True)):
        start = starts[:, lane]
        hi = max(hi, int((start + largest * np.maximum(part, 0).sum(1)).max()))
        lo = min(lo, int((start + largest * np.minimum(part, 0).sum(1)).min()))
    return lo, hi


def lane_names(left: Activation) -> tuple[str, ...]:
    """Names of the accumulators that one output value needs."""
    if isinstance(left, GroupedOperand):
        return tuple(f"group{g}" for g in range(left.groups))
    return ("multiply", "shift") if isinstance(left, HLUQOperand) else ("sum",)


def lane_tops(left: Activation) -> tuple[int, ...]:
    """Largest non-negative integer that enters each lane."""
    if isinstance(left, HLUQOperand):
        return top(left.bits) - left.log_levels, 2 ** (left.log_levels - 1)
    if isinstance(left, TableOperand):
        return (int(left.table.max()),)
    return (top(left.bits),) * len(lane_names(left))


def lane_slices(left: Activation, matrix: np.ndarray) -> list[np.ndarray]:
    """The columns of ``matrix`` (..., k) that each lane reads; of grouped channels in their reordered order."""
    if isinstance(left, GroupedOperand):
        return np.split(matrix[..., left.permutation], left.boundaries[1:-1], axis=-1)
    return [matrix] * len(lane_names(left))


def lane_starts(left: Activation, right: WeightOperand) -> np.ndarray:
    """int64 (n, lanes): what each accumulator starts with, minus zero point times the sum of its signed weights."""
    parts = lane_slices(left, right.signed())
    return np.stack([-zero * part.sum(1) for zero, part in zip(_zeros(left), parts, strict=True)], axis=1)


def zeros_of(operand: Activation | Right) -> np.ndarray | int:
    """Zero point of an operand of ``qk`` and ``av``, int64 (H,) of one that is per head; 0 of a table."""
    if isinstance(operand, PerHeadOperand):
        return operand.zero_points
    return operand.zero_point if isinstance(operand, UniformOperand) else 0


def _zeros(left: Activation) -> tuple[int, ...]:
    if isinstance(left, GroupedOperand):
        return tuple(int(zero) for zero in left.zero_points)
    return (left.zero_point,) if isinstance(left, UniformOperand) else (0,) * len(lane_names(left))
