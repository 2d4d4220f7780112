# SPDX-License-Identifier: Apache-2.0
"""Hybrid log-uniform quantization (HLUQ) of activations after GELU or ReLU, per tensor (AHCQ-SAM, section on HLUQ).

With ``y = x - offset`` and L log levels, code c < L has the level ``scale_log * 2^-c``, code L the level 0, and code
c > L the level ``scale_log + (c - L) * scale_uniform``. Boundaries between powers are their geometric means, the one
below the least power is ``scale_log * 2^-(L - 1/2)``, those of the uniform part lie half-way. Values beyond the range
take the nearest end: level 0 below, the top code above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from .dropping import Drop
from .tables import Band, Table

#: More powers of two would coincide next to a non-zero offset and need long shifts in hardware.
MAX_LOG_LEVELS = 16


@dataclass(frozen=True)
class HLUQParams:
    """Parameters of an HLUQ quantizer, each a tensor of one number.

    Attributes:
        offset: subtracted from x (the minimum of the data; 0 after ReLU).
        scale_log: > 0; the largest power-of-two level.
        scale_uniform: > 0; the step of the uniform part above it.
        log_levels: integer L in [1, min(16, 2^bits - 2)].
    """

    offset: Tensor
    scale_log: Tensor
    scale_uniform: Tensor
    log_levels: Tensor


@torch.no_grad()
def table(params: HLUQParams, bits: int) -> Table:
    """The table of ``params``, in units of x: offset + y.

    Raises:
        ValueError: bits outside 2..8, or a parameter that is not one number in its domain.
    """
    count = 2 ** tables.check_table_bits(bits)
    scale_log = tables.scalar("scale_log", params.scale_log, positive=True).double()
    step = tables.scalar("scale_uniform", params.scale_uniform, positive=True).double()
    offset = tables.scalar("offset", params.offset)
    split = _log_levels(params, bits)
    rank = torch.arange(count, device=scale_log.device)
    power = scale_log * tables.powers(1, scale_log.device)[(split - rank).clamp(0, MAX_LOG_LEVELS)]
    steps = (rank - split).clamp(min=0)
    levels = torch.where(rank == 0, 0.0, power + steps * step)
    ends = torch.where(rank < split, power * math.sqrt(2), power + (steps + 0.5) * step)
    codes = torch.where(rank == 0, split, torch.where(rank <= split, split - rank, rank))
    return tables.make_table(ends[:-1], levels, codes, ends[-1:], offset)


def encode(x: Tensor, params: HLUQParams, bits: int) -> Tensor:
    """int64 codes in [0, 2^bits - 1] of x (any shape), not monotone in x. NaN takes the top code."""
    return tables.encode(x, table(params, bits))


def decode(codes: Tensor, params: HLUQParams, bits: int) -> Tensor:
    """float32 values of the codes; ValueError for a code outside [0, 2^bits - 1]."""
    return tables.decode(codes, table(params, bits))


def fake_quantize(
    x: Tensor, params: HLUQParams, bits: int, grad_factor: float = 1.0, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, differentiable in x and both scales.

    Straight through: d x_hat / dx = 1 for 0 <= y <= top level + scale_uniform / 2, else 0. The scales:

    - y < 0: both get 0;
    - 0 <= y < scale_log + scale_uniform / 2 (powers and zero): scale_log gets (x_hat - x) / scale_log;
    - from there to the end: scale_uniform gets (x_hat - x) / scale_uniform;
    - beyond: scale_log gets 1 and scale_uniform 2^bits - 1 - L, the derivatives of the top level.

    Args:
        grad_factor: multiplies the gradients of the scales.
    """
    values = table(params, bits)
    split = _log_levels(params, bits)
    bands = (
        Band(tables.scalar("scale_log", params.scale_log), values.boundaries[split], 1.0),
        Band(tables.scalar("scale_uniform", params.scale_uniform), values.top, 2**bits - 1 - split),
    )
    return tables.fake_quantize(x, values, bands, grad_factor, drop)


def _log_levels(params: HLUQParams, bits: int) -> Tensor:
    split = tables.scalar("log_levels", params.log_levels).to(torch.as_tensor(params.scale_log).device, torch.int64)
    most = min(MAX_LOG_LEVELS, 2**bits - 2)
    if split.device.type == "cpu" and not 1 <= int(split) <= most:
        raise ValueError(f"`log_levels` must be an integer in [1, {most}] for {bits} bits, got {params.log_levels}")
    return split
