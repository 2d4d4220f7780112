# SPDX-License-Identifier: Apache-2.0
"""Power-of-two quantization, per tensor: ``y = x - offset`` has the levels ``scale * 2^-k`` and 0.

Code k = 0..2^bits - 2 is the exponent, code 2^bits - 1 is 0. The boundary below level k is ``scale * 2^-(k + 1/2)``,
also between the last power and 0. Values above ``scale`` saturate at code 0, values below the offset at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from .dropping import Drop
from .tables import Band, Table

MAX_BITS = 6


@dataclass(frozen=True)
class PowerOfTwoParams:
    """Parameters of a power-of-two quantizer, each a tensor of one number.

    Attributes:
        offset: subtracted from x (the minimum of the data). Levels closer to a non-zero offset than the spacing
            of float32 there coincide with it.
        scale: > 0; the largest level.
    """

    offset: Tensor
    scale: Tensor


def check_bits(bits: int) -> int:
    """``bits`` if it is an integer in [2, 6], else ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MAX_BITS:
        raise ValueError(
            f"`bits` of power_of_two must be an integer in [2, {MAX_BITS}], got {bits!r}: float32 cannot hold "
            "2^bits - 1 powers of two for more; use the families agq or hluq"
        )
    return bits


@torch.no_grad()
def table(params: PowerOfTwoParams, bits: int) -> Table:
    """The table of ``params``, in units of x: offset + y.

    Raises:
        ValueError: bits outside 2..6, or a parameter that is not one number in its domain.
    """
    scale = tables.scalar("scale", params.scale, positive=True)
    one = torch.ones(1, dtype=torch.int64, device=scale.device)
    return tables.log_table(scale, one, check_bits(bits), tables.scalar("offset", params.offset))


def encode(x: Tensor, params: PowerOfTwoParams, bits: int) -> Tensor:
    """int64 codes in [0, 2^bits - 1] of x (any shape), descending in x. NaN takes code 0, the top level."""
    return tables.encode(x, table(params, bits))


def decode(codes: Tensor, params: PowerOfTwoParams, bits: int) -> Tensor:
    """float32 values of the codes; ValueError for a code outside [0, 2^bits - 1]."""
    return tables.decode(codes, table(params, bits))


def fake_quantize(
    x: Tensor, params: PowerOfTwoParams, bits: int, grad_factor: float = 1.0, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, differentiable in x and ``scale``.

    Straight through: d x_hat / dx = 1 for 0 <= y <= scale, else 0. d x_hat / d scale = (x_hat - x) / scale there, 1
    above and 0 below, times ``grad_factor``.
    """
    values = table(params, bits)
    band = Band(tables.scalar("scale", params.scale), values.top, 1.0)
    return tables.fake_quantize(x, values, [band], grad_factor, drop)
