# SPDX-License-Identifier: Apache-2.0
"""Asymmetric uniform quantization.

``x_hat = (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale`` with true division, round half to
even, arithmetic in float32. The range always contains 0, so zero padding and masked values are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .dropping import Drop, mask
from .pieces import flat_pieces, is_dense, piece_size

SCALE_EPS = 1e-8


@dataclass(frozen=True)
class UniformParams:
    """Parameters of a uniform quantizer.

    Attributes:
        scale: float32, > 0, broadcastable against the quantized tensor.
        zero_point: integers in [0, 2^bits - 1] (any dtype), same shape as ``scale``; the code of the real value 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"`scale` and `zero_point` must have the same shape, got {tuple(self.scale.shape)} and "
                f"{tuple(self.zero_point.shape)}"
            )


def check_bits(bits: int) -> int:
    """``bits`` if it is an integer in [2, 16], else ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"`bits` must be an integer in [2, 16], got {bits!r}")
    return bits


def qparams_from_range(lo: Tensor, hi: Tensor, bits: int) -> UniformParams:
    """Scale and zero point of the range [min(lo, 0), max(hi, 0)].

    Args:
        lo, hi: same shape, any float dtype; ends of the range in the units of the data.
        bits: 2..16.
    Returns:
        UniformParams with float32 scale >= 1e-8 and int32 zero point, same shape as ``lo``.
    """
    lo = torch.clamp(lo.float(), max=0.0)
    hi = torch.clamp(hi.float(), min=0.0)
    qmax = 2 ** check_bits(bits) - 1
    scale = torch.clamp((hi - lo) / qmax, min=SCALE_EPS)
    zero_point = torch.clamp(torch.round(-lo / scale), 0, qmax)
    return UniformParams(scale, zero_point.to(torch.int32))


def encode(x: Tensor, params: UniformParams, bits: int) -> Tensor:
    """Integer codes in [0, 2^bits - 1]; round half to even, then saturate.

    Args:
        x: floats of any shape that ``params`` broadcasts against.
    Returns:
        int64, the broadcast shape.
    """
    zero_point = params.zero_point.to(torch.float32)
    return torch.clamp(torch.round(x.float() / params.scale) + zero_point, 0, 2**bits - 1).long()


def decode(codes: Tensor, params: UniformParams, bits: int) -> Tensor:
    """float32 values ``(codes - zero_point) * scale``.

    Raises:
        ValueError: a code lies outside [0, 2^bits - 1].
    """
    if bool(((codes < 0) | (codes > 2**bits - 1)).any()):
        raise ValueError(
            f"codes must lie in [0, {2**bits - 1}] for {bits} bits, got [{int(codes.min())}, {int(codes.max())}]"
        )
    return (codes.to(torch.float32) - params.zero_point.to(torch.float32)) * params.scale


def round_trip(x: Tensor, params: UniformParams, bits: int) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, in plain operators without checks: what compilers follow."""
    zero_point = params.zero_point.to(torch.float32)
    levels = torch.clamp(torch.round(x.float() / params.scale) + zero_point, 0, 2**bits - 1) - zero_point
    return (levels * params.scale).to(x.dtype)


class _FakeQuantizeUniform(torch.autograd.Function):
    """decode(encode(x)); straight-through gradient to x inside the range, LSQ gradient to the scale.

    d x_hat / d scale = round(x/s) - x/s inside, (saturated code - zero_point) outside (Esser et al., LSQ, eq. 3).
    """

    # Where there is no kernel: in pieces, in place, with 0/1 masks as floats. On CPUs the time goes into memory.

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, grad_factor, drop: Drop | None) -> Tensor:
        x = x if is_dense(x) else x.contiguous()
        dice = None if drop is None else drop.dice_like(x)
        ctx.save_for_backward(x, scale, zero_point, dice)
        ctx.qmax, ctx.grad_factor, ctx.threshold = qmax, grad_factor, 0 if drop is None else drop.threshold
        ctx.kernel = _kernel(x, scale, zero_point, qmax)
        if ctx.kernel is not None:
            return ctx.kernel.quantize(x, dice, ctx.threshold)
        scale, zero_point = _along_rows(scale), _along_rows(zero_point)
        out = torch.empty_like(x)
        for piece, target, thrown in zip(*(_pieces(t, scale) for t in (x, out)), _dice(dice, x, scale), strict=True):
            values = piece.float()
            work = target if target.dtype == torch.float32 else torch.empty_like(values)
            _levels(torch.div(values, scale, out=work), zero_point, qmax, out=work).mul_(scale)
            if drop is not None:
                torch.lerp(values, work, mask(thrown, drop.threshold), out=work)
            if work is not target:
                target.copy_(work)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, zero_point, dice = ctx.saved_tensors
        shape = scale.shape
        if grad.dtype != torch.float32 or grad.stride() != x.stride():  # attention permutes: one layout for all
            grad = torch.empty_like(x, dtype=torch.float32).copy_(grad)
        if ctx.kernel is not None:
            grad_x, grad_scale = ctx.kernel.gradients(x, grad, dice, ctx.threshold, ctx.needs_input_grad[1])
            return grad_x, _factored(grad_scale, ctx.grad_factor, shape), None, None, None, None
        scale, zero_point = _along_rows(scale), _along_rows(zero_point)
        grad_x, grad_scale = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            grad_scale = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
        for piece, above, target, thrown in zip(
            *(_pieces(t, scale) for t in (x, grad, grad_x)), _dice(dice, x, scale), strict=True
        ):
            ratio = piece.float() / scale
            levels = _levels(ratio, zero_point, ctx.qmax, out=torch.empty_like(ratio))
            inside = torch.sub(ratio, levels).abs_().le_(0.5)
            slope = levels.addcmul_(inside, ratio, value=-1)  # d x_hat / d scale
            if dice is not None:
                chosen = mask(thrown, ctx.threshold)
                slope.mul_(chosen)
                inside.sub_(1).mul_(chosen).add_(1)  # what was not quantized passes
            if grad_scale is not None:
                grad_scale += _sum_of_product(above, slope, scale)
            if target.dtype == torch.float32:
                torch.mul(inside, above, out=target)
            else:
                target.copy_(inside.mul_(above))
        return grad_x, _factored(grad_scale, ctx.grad_factor, shape), None, None, None, None


def _kernel(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> kernels.Uniform | None:
    """The kernel for a dense x, or None."""
    layout = kernels.rows(x, scale) if kernels.usable(x, scale, zero_point) else None
    return None if layout is None else kernels.Uniform(layout, scale, zero_point, qmax)


def _factored(grad_scale: Tensor | None, factor: float | Tensor, shape: torch.Size) -> Tensor | None:
    """float64 sums as the float32 gradient of a scale of this shape."""
    return None if grad_scale is None else (grad_scale.view(shape) * factor).float()


def _along_rows(params: Tensor) -> Tensor:
    """Parameters that differ along the last axis alone as (channels,), others as they are."""
    return params.reshape(-1) if params.ndim > 1 and params.numel() == params.shape[-1] else params


def _pieces(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """A dense x in pieces that ``scale`` broadcasts against, in the order of memory."""
    if scale.numel() == 1:
        return flat_pieces(x)
    if x.numel() and scale.numel() == scale.shape[-1] == x.shape[-1] and x.is_contiguous():
        return x.view(-1, x.shape[-1]).split(max(1, piece_size(x) // x.shape[-1]))
    return (x,)


def _dice(dice: Tensor | None, x: Tensor, scale: Tensor) -> Iterable[Tensor | None]:
    """The dice of every piece of x."""
    return (None for _ in _pieces(x, scale)) if dice is None else _pieces(dice, scale)


def _levels(ratio: Tensor, zero_point: Tensor, qmax: int, out: Tensor) -> Tensor:
    """code - zero_point of ``ratio = x / scale``, written to ``out``."""
    return torch.round(ratio, out=out).add_(zero_point).clamp_(0, qmax).sub_(zero_point)


def _sum_of_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of pieces a * b down to the shape of ``like``."""
    if like.numel() == 1:
        return torch.dot(a, b).view(like.shape)
    return (a * b).sum_to_size(like.shape)


def fake_quantize(
    x: Tensor, params: UniformParams, bits: int, grad_factor: float | Tensor = 1.0, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, differentiable in ``x`` and ``params.scale``.

    Args:
        x: floats that ``params`` broadcasts against (x is not expanded: its shape is the result's shape).
        grad_factor: multiplies the gradient of the scale (LSQ uses 1 / sqrt(numel * qmax)); a tensor has its shape.
        drop: quantizes the elements that it chooses, the others are x; None: all.
    """
    zero_point = params.zero_point.to(torch.float32)
    return _FakeQuantizeUniform.apply(x, params.scale, zero_point, 2**bits - 1, grad_factor, drop)
