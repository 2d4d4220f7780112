# SPDX-License-Identifier: Apache-2.0
"""The straightforward way to compute each family: a chain of differentiable tensor operations with rounding that lets
gradients pass. Opponent of the benchmark, and an independent statement of the formulas."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ahcq_plugin.quantizers import (
    AdaRoundFakeQuantize,
    AGQFakeQuantize,
    CAGFakeQuantize,
    FakeQuantize,
    HLUQFakeQuantize,
    LNQFakeQuantize,
    PowerOfTwoFakeQuantize,
    UniformFakeQuantize,
)


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes."""
    return (x.round() - x).detach() + x


def scaled_gradient(t: Tensor, factor: float) -> Tensor:
    """``t``, with its gradient times ``factor``."""
    return (t - t * factor).detach() + t * factor


def uniform(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    scale = scaled_gradient(scale, (x.numel() / scale.numel() * qmax) ** -0.5)
    return (torch.clamp(round_through(x / scale) + zero_point, 0, qmax) - zero_point) * scale


def hluq(x: Tensor, offset: Tensor, scale_log: Tensor, scale_uniform: Tensor, log_levels: int, qmax: int) -> Tensor:
    y = x - offset
    exponent = round_through(-torch.log2(torch.clamp(y, min=1e-20) / scale_log))
    power = scale_log * 2 ** -torch.clamp(exponent, 0, log_levels - 1)
    power = torch.where(exponent >= log_levels, torch.zeros_like(power), power)
    steps = torch.clamp(round_through((y - scale_log) / scale_uniform), 0, qmax - log_levels)
    return torch.where(y <= scale_log, power, steps * scale_uniform + scale_log) + offset


def lnq(x: Tensor, shape_factor: Tensor, clip: Tensor, qmax: int) -> Tensor:
    x = torch.minimum(torch.clamp(x, min=1e-20), clip)
    codes = round_through(torch.log1p(shape_factor * x) / torch.log1p(shape_factor * clip) * qmax)
    return torch.expm1(codes / qmax * torch.log1p(shape_factor * clip)) / shape_factor


def agq(x: Tensor, scale: Tensor, tau: int, qmax: int) -> Tensor:
    codes = round_through(-tau * torch.log2(torch.clamp(x, min=1e-20) / scale))
    values = scale * 2 ** (-torch.clamp(codes, 0, qmax - 1) / tau)
    return torch.where(codes >= qmax, torch.zeros_like(values), values)


def adaround(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    up = torch.clamp(1.2 * torch.sigmoid(alpha) - 0.1, 0, 1)
    return (torch.clamp(torch.floor(weight / scale) + up + zero_point, 0, qmax) - zero_point) * scale


def compose(q: FakeQuantize, x: Tensor) -> Tensor:
    """What ``q.quantize(x)`` computes, as a chain of operations."""
    if isinstance(q, AdaRoundFakeQuantize):
        scale, zero_point = (t.view(-1, *[1] * (x.ndim - 1)) for t in (q.scale, q.zero_point))
        return adaround(x, q.alpha, scale, zero_point, q.quant_max)
    if isinstance(q, CAGFakeQuantize):
        return uniform(x, q.scale[q.labels], q.zero_point[q.labels], q.quant_max)
    if isinstance(q, UniformFakeQuantize):
        return uniform(x, q.scale, q.zero_point, q.quant_max)
    if isinstance(q, HLUQFakeQuantize):
        return hluq(x, q.offset, q.scale[0], q.scale[1], int(q.log_levels), q.quant_max)
    if isinstance(q, LNQFakeQuantize):
        return lnq(x, q.shape_factor, q.scale, q.quant_max)
    if isinstance(q, AGQFakeQuantize):
        return agq(x, q.scale, int(q.tau), q.quant_max)
    if isinstance(q, PowerOfTwoFakeQuantize):
        return agq(x - q.offset, q.scale, 1, q.quant_max) + q.offset
    raise TypeError(f"no composition of {type(q).__name__}")


def composed(module: nn.Module) -> nn.Module:
    """A copy of a prepared module whose quantizers compute by ``compose``, with random drops by ``where``."""
    module = copy.deepcopy(module)
    for q in module.modules():
        if isinstance(q, FakeQuantize):
            q.forward = lambda x, q=q: _forward(q, x)
    return module


def _forward(q: FakeQuantize, x: Tensor) -> Tensor:
    if not q.quantizing:
        return x
    out = compose(q, x)
    return out if q.prob == 1.0 else torch.where(torch.rand_like(x) < q.prob, out, x)


__all__ = ["compose", "composed"]
