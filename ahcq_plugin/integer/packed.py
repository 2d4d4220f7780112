# SPDX-License-Identifier: Apache-2.0
"""A weight as packed codes, and the forms of it that backends multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from ahcq_plugin.export.operands import WeightOperand, top
from ahcq_plugin.export.packing import pack
from ahcq_plugin.integer.forms import Forms


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 (count,) codes from what ``export.packing.pack`` made, on the tensor's device."""
    if bits == 8:
        return packed[:count]
    words = -(-count // 8)  # of 8 codes, ``bits`` bytes
    padded = packed.new_zeros(words * bits)
    padded[: len(packed)] = packed
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return padded[:, None].bitwise_right_shift(places).bitwise_and_(top(bits)).flatten()[:count]
    places = torch.arange(bits, device=packed.device) * 8
    word = padded.view(words, bits).long().bitwise_left_shift(places).sum(1, keepdim=True)
    codes = word.bitwise_right_shift(torch.arange(8, device=packed.device) * bits).bitwise_and_(top(bits))
    return codes.flatten()[:count].to(torch.uint8)


class PackedWeight(Forms):
    """Codes (n, k) of ``bits`` bits, packed; the state has nothing else of the weight but scales and zero points.

    Attributes:
        packed: uint8, as ``export.packing.pack`` lays it out.
        scales: float32 (n,).
        zero_points: uint8 (n,).
    """

    def __init__(self, weight: WeightOperand, keep: bool):
        super().__init__()
        self.bits, self.shape, self.keep = weight.bits, weight.codes.shape, keep
        self.register_buffer("packed", torch.from_numpy(pack(weight.codes, weight.bits)))
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))
        self.register_buffer("zero_points", torch.from_numpy(weight.zero_points).to(torch.uint8))

    def codes(self) -> Tensor:
        """uint8 (n, k)."""
        return unpack_codes(self.packed, self.bits, self.shape[0] * self.shape[1]).view(self.shape)

    def signed(self) -> Tensor:
        """int16 (n, k): code minus zero point."""
        return self.codes().short() - self.zero_points.short()[:, None]

    def extra_repr(self) -> str:
        return f"{self.shape}, bits={self.bits}"
