# SPDX-License-Identifier: Apache-2.0
"""Logarithmic non-linear quantization (LNQ) of attention probabilities, per tensor (AHCQ-SAM, section on LNQ).

Uniform in ``ln(1 + a x) / ln(1 + a S)`` on [0, S]: with N = 2^bits - 1, code q has the level
``expm1(q / N * log1p(a S)) / a`` (q = 0: exactly 0, q = N: S), and the boundary between q - 1 and q is the same with
q - 1/2. The shape factor a goes from nearly uniform (0.001) to nearly logarithmic (thousands).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from .dropping import Drop
from .tables import Table

#: Fraction bits, relative to the clip, of the decode table that hardware multiplies with.
DECODE_FRACTION_BITS = 16


@dataclass(frozen=True)
class LNQParams:
    """Parameters of an LNQ quantizer, each a tensor of one number.

    Attributes:
        shape_factor: a > 0.
        clip: S > 0; larger values saturate.
    """

    shape_factor: Tensor
    clip: Tensor


@torch.no_grad()
def table(params: LNQParams, bits: int, levels: Tensor | None = None) -> Table:
    """The table of ``params``; ``levels`` (2^bits,) float32, if given, replaces the decoded values.

    Raises:
        ValueError: bits outside 2..8, a parameter that is not one positive number, or ``levels`` of another length.
    """
    top = 2 ** tables.check_table_bits(bits) - 1
    clip = tables.scalar("clip", params.clip, positive=True).double()
    halves = torch.arange(2 * top + 1, dtype=torch.float64, device=clip.device)
    values = _inverse(params, clip, halves / (2 * top))
    codes = torch.arange(top + 1, device=clip.device)
    result = tables.make_table(values[1::2], values[::2], codes, clip)
    if levels is None:
        return result
    if levels.shape != result.levels.shape:
        raise ValueError(f"`levels` must have shape ({top + 1},) for {bits} bits, got {tuple(levels.shape)}")
    return dataclasses.replace(result, levels=levels)


@torch.no_grad()
def integer_levels(params: LNQParams, bits: int, fraction_bits: int = DECODE_FRACTION_BITS) -> Tensor:
    """The decode table in units of ``clip * 2^-fraction_bits``: (2^bits,) int64, rounded half to even.

    From 0 to 2^fraction_bits; ``levels = integers * 2^-fraction_bits * clip`` in float32.
    """
    clip = tables.scalar("clip", params.clip, positive=True).double()
    codes = torch.arange(2 ** tables.check_table_bits(bits), dtype=torch.float64, device=clip.device)
    return torch.round(_inverse(params, clip, codes / codes[-1]) / clip * 2**fraction_bits).long()


def encode(x: Tensor, params: LNQParams, bits: int) -> Tensor:
    """int64 codes in [0, 2^bits - 1] of x (any shape). NaN takes the top code."""
    return tables.encode(x, table(params, bits))


def decode(codes: Tensor, params: LNQParams, bits: int, levels: Tensor | None = None) -> Tensor:
    """float32 values of the codes, ``levels[codes]`` if given; ValueError for a code outside [0, 2^bits - 1]."""
    return tables.decode(codes, table(params, bits, levels))


def fake_quantize(
    x: Tensor, params: LNQParams, bits: int, levels: Tensor | None = None, drop: Drop | None = None
) -> Tensor:
    """``decode(encode(x))`` bit for bit, in x's dtype, differentiable in x.

    Straight through: d x_hat / dx = 1 for 0 <= x <= clip, else 0. The parameters have no gradient: LNQ is static.
    """
    return tables.fake_quantize(x, table(params, bits, levels), drop=drop)


def _inverse(params: LNQParams, clip: Tensor, share: Tensor) -> Tensor:
    """expm1(share * log1p(a * clip)) / a in float64."""
    shape = tables.scalar("shape_factor", params.shape_factor, positive=True).double()
    return torch.expm1(share * torch.log1p(shape * clip)) / shape
