# SPDX-License-Identifier: Apache-2.0
"""Quantizers given by a sorted table; the families ``hluq``, ``lnq``, ``power_of_two`` and ``agq`` make the tables.

A value takes the level between its two neighbouring boundaries, on a boundary the upper level. Values are compared in
float32. Comparisons, unlike logarithms, give the same bits in every library and on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .dropping import Drop, mask
from .pieces import flat_pieces

_BUCKETS_FROM = 2**14  # elements; for fewer a binary search is faster than making the buckets
_MAX_BUCKETS = 2**16
MAX_EXPONENT = 64  # levels reach down to 2^-64 of the scale: normal float32 numbers for any scale above 1e-18


@dataclass(frozen=True)
class Table:
    """A quantizer of n = 2^bits levels; build it with ``make_table``. All tensors are on one device.

    Attributes:
        boundaries: (n - 1,) float32, ascending; boundary r separates the ranks r and r + 1.
        levels: (n,) float32, ascending; the level of each rank.
        codes: (n,) int64; the code of each rank, a permutation of 0..n - 1.
        bottom, top: (1,) float32; values below ``bottom`` (the lowest level) or above ``top`` are saturated.
    """

    boundaries: Tensor
    levels: Tensor
    codes: Tensor
    bottom: Tensor
    top: Tensor


@dataclass(frozen=True)
class Band:
    """A learned scale and the part of the range whose levels it stretches.

    Attributes:
        scale: (1,) float32.
        end: (1,) float32; the band holds the values from the end of the band before (the first: from ``bottom``) to
            ``end``.
        slope: derivative of the top level with respect to ``scale``.
    """

    scale: Tensor
    end: Tensor
    slope: Tensor | float


def check_table_bits(bits: int) -> int:
    """``bits`` if it is an integer in [2, 8], else ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"`bits` of a table must be an integer in [2, 8], got {bits!r}")
    return bits


def scalar(name: str, value: Tensor | float, positive: bool = False) -> Tensor:
    """``value`` as a (1,) tensor.

    Raises:
        ValueError: it does not hold one number, or not a positive one where it must (on a GPU the value is not looked
            at, which would wait for it).
    """
    value = torch.as_tensor(value)
    if value.numel() != 1:
        raise ValueError(f"`{name}` must hold one number (the family is per tensor), got shape {tuple(value.shape)}")
    if positive and value.device.type == "cpu" and not 0 < float(value.detach()) < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {float(value.detach())}")
    return value.reshape(1)


@lru_cache(maxsize=32)
def powers(parts: int, device: torch.device) -> Tensor:
    """float64 2^(-k / parts) for k = 0 .. (MAX_EXPONENT + 1) * parts; equal fractions have equal mantissas."""
    count = (MAX_EXPONENT + 1) * parts + 1
    values = [math.ldexp(2.0 ** (-(k % parts) / parts), -(k // parts)) for k in range(count)]
    return torch.tensor(values, dtype=torch.float64, device=device)


def make_table(boundaries: Tensor, levels: Tensor, codes: Tensor, top: Tensor, offset: Tensor | None = None) -> Table:
    """A table from float64 boundaries, levels and top; ``offset`` (1,) is added to them before they become float32.

    A boundary that rounding has moved onto the level below goes back between its levels, so that every level keeps its
    code. Levels that rounding has made equal share the highest of their codes' ranks.
    """
    if offset is not None:
        boundaries, levels, top = (value + offset.detach().double() for value in (boundaries, levels, top))
    levels = levels.float()
    above = torch.nextafter(levels[:-1], levels.new_full((1,), math.inf))
    boundaries = torch.minimum(torch.maximum(boundaries.float(), above), levels[1:])
    return Table(boundaries, levels, codes, levels[:1], top.float())


def log_table(scale: Tensor, parts: Tensor, bits: int, offset: Tensor | None = None) -> Table:
    """Levels ``scale * 2^(-q / parts)`` of the codes q = 0..2^bits - 2, and 0 of the code 2^bits - 1.

    The boundary below the level of q is ``scale * 2^(-(q + 1/2) / parts)``, also between the last level and 0.

    Args:
        scale: (1,) > 0; parts: (1,) integer, 1, 2 or 4 levels per octave.
    """
    count = 2**bits
    codes = torch.arange(count - 1, -1, -1, device=scale.device)
    eighths = powers(8, scale.device) * scale.double()
    index = torch.div(8 * codes[1:], parts, rounding_mode="floor").clamp_(max=8 * MAX_EXPONENT)
    half = torch.div(4, parts, rounding_mode="floor")
    levels = torch.cat([eighths.new_zeros(1), eighths[index]])
    return make_table(eighths[index + half], levels, codes, scale.double(), offset)


def encode(x: Tensor, table: Table) -> Tensor:
    """int64 codes of x, same shape. NaN takes the code of the top level."""
    return table.codes[torch.bucketize(x.float().contiguous(), table.boundaries, right=True)]


def decode(codes: Tensor, table: Table) -> Tensor:
    """float32 values of the codes, same shape.

    Raises:
        ValueError: a code lies outside [0, 2^bits - 1].
    """
    top = len(table.levels) - 1
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > top):
        raise ValueError(
            f"codes must lie in [0, {top}] for {top.bit_length()} bits, got [{int(codes.min())}, {int(codes.max())}]"
        )
    return torch.empty_like(table.levels).scatter_(0, table.codes, table.levels)[codes.long()]


def fake_quantize(
    x: Tensor, table: Table, bands: Sequence[Band] = (), grad_factor: float = 1.0, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit in x's dtype and shape, differentiable in x and the scales of ``bands``.

    Straight through: d x_hat / dx = 1 for bottom <= x <= top, else 0. Levels above ``bottom`` are homogeneous in the
    scales: within its band d x_hat / d scale = (x_hat - x) / scale; above ``top`` it is ``slope``, below ``bottom`` 0.
    The gradients of the scales are multiplied by ``grad_factor``. NaN stays NaN, so that a broken model shows. With
    ``drop`` the elements that it chooses are quantized, the others are x.
    """
    return _FakeQuantizeTable.apply(x, table, tuple(bands), float(grad_factor), drop, *(band.scale for band in bands))


class _FakeQuantizeTable(torch.autograd.Function):
    # Nothing but x is kept for the backward pass: to find the levels again costs less than to store them.

    @staticmethod
    def forward(ctx, x: Tensor, table: Table, bands: tuple[Band, ...], grad_factor: float, drop: Drop | None, *scales):
        x = x.contiguous()
        dice = None if drop is None else drop.dice_like(x)
        ctx.save_for_backward(x, dice, *scales)
        ctx.table, ctx.grad_factor, ctx.threshold = table, grad_factor, 0 if drop is None else drop.threshold
        ctx.ends, ctx.slopes = [band.end for band in bands], [band.slope for band in bands]
        ctx.kernel = kernels.Sorted(table, x.numel(), ctx.ends) if kernels.usable_for_tables(x) else None
        if ctx.kernel is not None:
            return ctx.kernel.quantize(x, dice, ctx.threshold)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        find = _level_finder(table, x)
        for part, target, thrown in zip(flat_pieces(x), flat_pieces(out), _dice(dice, x), strict=True):
            values = part.float()
            levels = find(values)
            if x.device.type != "cpu" or math.isnan(float(values.sum())):
                levels = torch.where(values.isnan(), values, levels)
            if drop is not None:
                levels = torch.lerp(values, levels, mask(thrown, drop.threshold), out=levels)
            target.copy_(levels)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, dice, *scales = ctx.saved_tensors
        table, learned = ctx.table, any(ctx.needs_input_grad[5:])
        if ctx.kernel is not None:
            grad_x, sums = ctx.kernel.gradients(x, grad.float().contiguous(), dice, ctx.threshold, learned)
            return grad_x, None, None, None, None, *_scale_gradients(ctx, scales, sums)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.zeros(len(scales) + 1, dtype=torch.float64, device=x.device)
        find = _level_finder(table, x) if learned else None
        tensors = (x, grad.contiguous(), grad_x)
        for part, out_grad, target, thrown in zip(*map(flat_pieces, tensors), _dice(dice, x), strict=True):
            values, out_grad = part.float(), out_grad.float()
            passed = None
            if dice is not None:  # what was not quantized passes
                quantized = mask(thrown, ctx.threshold).mul_(out_grad)
                passed, out_grad = out_grad - quantized, quantized
            inside = torch.minimum(torch.maximum(values, table.bottom), table.top)
            # Masks are floats: on CPUs this is several times faster than bool and where.
            inner = torch.eq(values, inside, out=torch.empty_like(values))
            straight = out_grad * inner
            target.copy_(straight if passed is None else passed.add_(straight))
            if learned:
                product = find(inside).sub_(inside).mul_(straight)
                for k, end in enumerate(ctx.ends[:-1]):
                    sums[k] += torch.dot(product, torch.lt(values, end, out=inner))
                    product.mul_(torch.ge(values, end, out=inner))
                sums[-2] += product.sum()
                sums[-1] += torch.dot(out_grad, torch.gt(values, table.top, out=inner))
        return grad_x, None, None, None, None, *_scale_gradients(ctx, scales, sums if learned else None)


def _scale_gradients(ctx, scales: Sequence[Tensor], sums: Tensor | None) -> list[Tensor | None]:
    """Of each band's scale, from the sums over the bands and over what lies above the top."""
    if sums is None:
        return [None] * len(scales)
    return [
        ((total / scale + slope * sums[-1]) * ctx.grad_factor).to(scale.dtype)
        for total, scale, slope in zip(sums, scales, ctx.slopes, strict=False)
    ]


def _dice(dice: Tensor | None, x: Tensor) -> Iterable[Tensor | None]:
    """The dice of every piece of x."""
    return (None for _ in flat_pieces(x)) if dice is None else flat_pieces(dice)


def _level_finder(table: Table, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from contiguous float32 values to new tensors of their levels; of NaN it gives any level.

    On CPUs a binary search costs more than everything else together. Floats above 0 are ordered like their bits as
    integers: these, of x - bottom, are cut into equal buckets so short that each holds one boundary at most. A value
    looks up its bucket, is compared with the boundary there and looks up the level.
    """
    buckets = _buckets(table) if x.device.type == "cpu" and x.numel() >= _BUCKETS_FROM else None
    if buckets is None:
        return lambda values: table.levels[torch.bucketize(values, table.boundaries, right=True)]
    bottom, first, last, shift, thresholds, levels = buckets

    def find(values: Tensor) -> Tensor:
        bits = (values - bottom if bottom else values).view(torch.int32)
        bucket = torch.clamp(bits, first, last).sub_(first).bitwise_right_shift_(shift)
        above = torch.ge(values, thresholds.index_select(0, bucket), out=torch.empty_like(bucket))
        return levels.index_select(0, above.add_(bucket, alpha=2))

    return find


def _buckets(table: Table) -> tuple[float, int, int, int, Tensor, Tensor] | None:
    """Bottom, first and last bits, log2 of the buckets' length, the boundary and both levels of each bucket.

    x - bottom is rounded, but never out of order: where it is equal for a value and a boundary they share a bucket.
    """
    apart = table.levels.diff() > 0
    boundaries = table.boundaries[apart]
    levels = torch.cat([table.bottom, table.levels[1:][apart]])
    bits = (boundaries - table.bottom).view(torch.int32)
    if len(bits) < 2 or int(bits.diff().min()) <= 0:
        return None
    first, last, shift = int(bits[0]) - 1, int(bits[-1]), int(bits.diff().min()).bit_length() - 1
    count = ((last - first) >> shift) + 1
    if first < 0 or count > _MAX_BUCKETS:
        return None
    starts = (torch.arange(count, dtype=torch.int32) << shift).add_(first)
    rank = torch.bucketize(starts, bits)
    thresholds = torch.cat([boundaries, boundaries.new_full((1,), math.inf)])[rank]
    pairs = torch.stack([levels[rank], levels[(rank + 1).clamp_(max=len(bits))]], 1)
    return float(table.bottom), first, last, shift, thresholds, pairs.flatten()
