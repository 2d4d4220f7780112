# SPDX-License-Identifier: Apache-2.0
"""Products of two run-time operands, ``qk`` and ``av``: codes to float32, bit-equal to ``export.golden``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.export.matmul import zeros_of
from ahcq_plugin.export.operands import Activation, PerHeadOperand, TableOperand, UniformOperand, top
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.forms import Forms
from ahcq_plugin.integer.lanes import Lane, Pass, make_lanes


class IntegerProduct(Forms):
    """``acc = ((P - zero_b * A) - zero_a * B) + k * zero_a * zero_b``, then ``f(acc) * scale``.

    Left codes (..., m, k) and right codes (..., k, n), uint8, give float32 (..., m, n). Scale and zero points may
    differ between heads: vectors of h elements, h dividing the product of the leading axes. As in the golden model
    product i, counted over these in C order, is of head i % h.

    Attributes:
        family: of the left operand.
        left_bits, right_bits: of the codes.
        left_zero, right_zero: int64 (1,) or (h,).
        scale: float32 (1,) or (h,), the product of both scales.
    """

    def __init__(self, left: Activation, right: UniformOperand | PerHeadOperand):
        super().__init__()
        self.family, self.left_bits, self.right_bits = left.family, left.bits, right.bits
        # digits of codes are the same for all heads
        self._left = UniformOperand(left.bits, np.float32(1), 0) if isinstance(left, PerHeadOperand) else left
        zeros = zeros_of(left), zeros_of(right)
        self.register_buffer("left_zero", torch.from_numpy(np.atleast_1d(zeros[0]).astype(np.int64)))
        self.register_buffer("right_zero", torch.from_numpy(np.atleast_1d(zeros[1]).astype(np.int64)))
        self.register_buffer("scale", torch.from_numpy(np.atleast_1d(_scale(left) * _scale(right)).astype(np.float32)))
        self.heads = max(map(len, (self.left_zero, self.right_zero, self.scale)))

    @torch.compiler.disable
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        shape = (*left.shape[:-1], right.shape[-1])
        if left.shape[:-2] != right.shape[:-2]:
            raise ValueError(
                f"leading axes of the operands differ: {tuple(left.shape)} and {tuple(right.shape)}; expand them"
            )
        left, right = (codes.reshape(-1, *codes.shape[-2:]) for codes in (left, right))
        if len(left) % self.heads:
            raise ValueError(f"{len(left)} products cannot be shared out to {self.heads} heads")
        return backend_for(left).product(self, left, right).view(shape)

    def lane(self, k: int) -> Lane:
        """The accumulator of k terms."""
        return make_lanes(self._left, k)[0]

    def passes(self, k: int) -> list[Pass]:
        """The 8-bit products of k terms; right operands are codes, shifted by 128 where they have 8 bits."""
        return list(self.lane(k).passes(max(top(self.right_bits), 128)))

    def correct(self, product: Tensor, left_sums: Tensor, right_sums: Tensor, k: int) -> Tensor:
        """float32 (b, m, n) from P (b, m, n), A (b, m) and B (b, n), int64."""
        batch = len(product)
        left_zero, right_zero = (self.per_batch(zero, batch) for zero in (self.left_zero, self.right_zero))
        acc = product - right_zero * left_sums[:, :, None]
        acc = acc - left_zero * right_sums[:, None, :] + k * left_zero * right_zero
        return acc.to(torch.float32) * self.per_batch(self.scale, batch)

    @staticmethod
    def per_batch(values: Tensor, batch: int) -> Tensor:
        """(1,) or (h,) values for ``batch`` products, (1 or batch, 1, 1)."""
        return values.repeat(batch // len(values) if len(values) > 1 else 1)[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.family}, bits={self.left_bits} x {self.right_bits}"


def _scale(operand: Activation | PerHeadOperand) -> np.float32 | np.ndarray:
    if isinstance(operand, PerHeadOperand):
        return operand.scales
    return operand.unit if isinstance(operand, TableOperand) else operand.scale
