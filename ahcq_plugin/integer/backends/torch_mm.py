# SPDX-License-Identifier: Apache-2.0
"""PyTorch's 8-bit products: oneDNN on CPUs (VNNI, AMX), tensor cores on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ahcq_plugin.integer.backends.base import Backend, combine, take

if TYPE_CHECKING:
    from ahcq_plugin.integer.layers import IntegerLinear
    from ahcq_plugin.integer.products import IntegerProduct

_SHIFT = 128
_S8_TOP = 127


class TorchBackend(Backend):
    """``torch._int_mm``, int8 times int8. Unsigned operands above 127 are shifted by 128 and corrected by sums of the
    other operand; all sums are modulo 2^32, which is exact since every product is proved to fit int32."""

    name = "torch"
    devices = ("cpu", "cuda")

    def linear_sums(self, layer: IntegerLinear, codes: Tensor) -> list[Tensor]:
        weight, column_sums, added = layer.weight.form("s8", lambda: _shifted(layer))
        sums = []
        for lane in layer.lanes:
            passes, products = layer.passes(lane), []
            for one in passes:
                digits = take(one.table, codes[:, one.begin : one.end])
                part = weight[one.begin : one.end]
                sums_of_part = column_sums if len(part) == layer.k else part.int().sum(0, dtype=torch.int32)
                product = _product(digits, one.top, part, sums_of_part)
                if added is not None:
                    product += digits.sum(1, keepdim=True, dtype=torch.int32) * added
                products.append(product)
            sums.append(combine(passes, products, layer.fits_int32))
        return sums

    def product_sum(self, product: IntegerProduct, left: Tensor, right: Tensor) -> Tensor:
        shift = _SHIFT if product.right_bits == 8 else 0
        signed = (right.short() - shift).to(torch.int8)
        total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.int64, device=left.device)
        for one in product.passes(left.shape[-1]):
            digits = take(one.table, left[..., one.begin : one.end])
            part = signed[:, one.begin : one.end]
            column_sums = part.sum(1, dtype=torch.int32)
            for item in range(len(left)):
                result = _product(digits[item], one.top, part[item], column_sums[item])
                total[item].add_(result.long(), alpha=one.factor)
            if shift:
                total += (digits.sum(-1, keepdim=True, dtype=torch.int64) * shift) * one.factor
        return total


def _shifted(layer: IntegerLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 (k, n) weights, their column sums, and what times the left operand's row sum is to be added (n,).

    Signed weights as they are where they fit 8 bits; else codes minus 128, the rest of the zero point in the third.
    """
    signed, added = layer.weight.signed(), None
    if int(signed.max()) > _S8_TOP or int(signed.min()) < -_SHIFT:
        signed = layer.weight.codes().short() - _SHIFT
        added = _SHIFT - layer.weight.zero_points.int()
    weight = signed.to(torch.int8)
    weight = (weight[:, layer.permutation] if len(layer.permutation) else weight).t().contiguous()
    return weight, weight.sum(0, dtype=torch.int32), added


def _product(digits: Tensor, largest: int, weight: Tensor, column_sums: Tensor) -> Tensor:
    """int32 (m, n) of uint8 digits (m, k) and int8 weights (k, n)."""
    if not digits.numel() or not weight.numel():
        return digits.new_zeros((len(digits), weight.shape[1]), dtype=torch.int32)
    if largest <= _S8_TOP:
        return _int_mm(digits.view(torch.int8), weight)
    return _int_mm(digits.bitwise_xor(_SHIFT).view(torch.int8), weight) + _SHIFT * column_sums


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    left, right = _rows(left), _rows(right)
    if not left.is_cuda:
        return torch._int_mm(left, right)
    (m, k), n = left.shape, right.shape[1]  # cuBLAS takes more than 16 rows, and multiples of 8
    extra_m, extra_k, extra_n = max(0, 17 - m), -k % 8, -n % 8
    padded: Any = F.pad(left, (0, extra_k, 0, extra_m)), F.pad(right, (0, extra_n, 0, extra_k))
    return torch._int_mm(*padded)[:m, :n]


def _rows(matrix: Tensor) -> Tensor:
    """Row by row; ``contiguous`` keeps the odd strides of single rows and columns, which ``_int_mm`` misreads."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.new_empty(matrix.shape).copy_(matrix)
