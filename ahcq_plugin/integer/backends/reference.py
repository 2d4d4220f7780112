# SPDX-License-Identifier: Apache-2.0
"""The definition in plain integers, for every device: slow, and what other backends are checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ahcq_plugin.integer.backends.base import Backend, take
from ahcq_plugin.integer.digits import Digits

if TYPE_CHECKING:
    from ahcq_plugin.integer.layers import IntegerLinear
    from ahcq_plugin.integer.products import IntegerProduct

_INT32_BITS = 31


class ReferenceBackend(Backend):
    """Operands as integers, not as digits; int32 products where the sum is proved to fit, else int64."""

    name = "reference"
    devices = ("cpu", "cuda")

    def linear_sums(self, layer: IntegerLinear, codes: Tensor) -> list[Tensor]:
        weight = layer.weight.form("signed", lambda: _signed(layer)).t()
        return [
            _exact(_operands(lane.digits, codes[:, lane.begin : lane.end]), weight[lane.begin : lane.end])
            for lane in layer.lanes
        ]

    def product_sum(self, product: IntegerProduct, left: Tensor, right: Tensor) -> Tensor:
        return _exact(_operands(product.lane(left.shape[-1]).digits, left), right.int()).long()


def _signed(layer: IntegerLinear) -> Tensor:
    weight = layer.weight.signed().int()
    return weight[:, layer.permutation] if len(layer.permutation) else weight


def _operands(digits: Digits, codes: Tensor) -> Tensor:
    parts = zip(digits.factors, digits.tables, strict=True)
    return torch.stack([int(factor) * take(table, codes).long() for factor, table in parts]).sum(0)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of integers. CUDA multiplies no integers: float64 is exact there while sums stay below 2^53."""
    if a.is_cuda:
        return (a.double() @ b.double()).long()
    largest = int(a.max() if a.numel() else 0) * int(b.abs().max() if b.numel() else 0) * a.shape[-1]
    dtype = torch.int32 if largest.bit_length() <= _INT32_BITS else torch.int64
    return a.to(dtype) @ b.to(dtype)
