# SPDX-License-Identifier: Apache-2.0
"""Adaptive granularity quantization (AGQ) of attention probabilities, per tensor (Lv et al., PTQ4SAM, 2024).

Code q = 0..2^bits - 2 has the level ``scale * 2^(-q / tau)``, code 2^bits - 1 the level 0: exactly 2^bits levels. The
boundary below level q is ``scale * 2^(-(q + 1/2) / tau)``, also between the last level and 0. Values above ``scale``
saturate at code 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from .dropping import Drop
from .tables import Band, Table

TAUS = (1, 2, 4)


@dataclass(frozen=True)
class AGQParams:
    """Parameters of an AGQ quantizer, each a tensor of one number.

    Attributes:
        scale: > 0; the largest level.
        tau: integer, levels per octave: 1, 2 or 4; from 7 bits on at least 2, at 8 bits 4 (see ``allowed_taus``).
    """

    scale: Tensor
    tau: Tensor


def allowed_taus(bits: int) -> tuple[int, ...]:
    """Values of tau whose 2^bits - 1 levels are distinct normal float32 numbers; bits must be in [2, 8]."""
    return tuple(tau for tau in TAUS if 2 ** tables.check_table_bits(bits) - 2 <= tau * tables.MAX_EXPONENT)


@torch.no_grad()
def table(params: AGQParams, bits: int) -> Table:
    """The table of ``params``.

    Raises:
        ValueError: bits outside 2..8, or a parameter that is not one number in its domain.
    """
    allowed = allowed_taus(bits)
    scale = tables.scalar("scale", params.scale, positive=True)
    tau = tables.scalar("tau", params.tau).to(scale.device)
    if tau.device.type == "cpu" and tau.item() not in allowed:
        raise ValueError(f"`tau` must be one of {allowed} for {bits} bits, got {tau.item()}")
    return tables.log_table(scale, tau.long(), bits)


def encode(x: Tensor, params: AGQParams, bits: int) -> Tensor:
    """int64 codes in [0, 2^bits - 1] of x (any shape), descending in x. NaN takes code 0, the top level."""
    return tables.encode(x, table(params, bits))


def decode(codes: Tensor, params: AGQParams, bits: int) -> Tensor:
    """float32 values of the codes; ValueError for a code outside [0, 2^bits - 1]."""
    return tables.decode(codes, table(params, bits))


def fake_quantize(
    x: Tensor, params: AGQParams, bits: int, grad_factor: float = 1.0, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, differentiable in x and ``scale``.

    Straight through: d x_hat / dx = 1 for 0 <= x <= scale, else 0. d x_hat / d scale = (x_hat - x) / scale there, 1
    above and 0 below, times ``grad_factor``.
    """
    values = table(params, bits)
    band = Band(tables.scalar("scale", params.scale), values.top, 1.0)
    return tables.fake_quantize(x, values, [band], grad_factor, drop)
