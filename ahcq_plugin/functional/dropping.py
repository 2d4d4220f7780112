# SPDX-License-Identifier: Apache-2.0
"""Random drops for QDrop (Wei et al. 2022): which elements are quantized in a step of reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drop:
    """A random choice among the elements of a tensor: those whose byte lies below ``threshold`` are quantized.

    A byte instead of a bool or float mask: on CPUs the time goes into memory.

    Attributes:
        dice: uint8, shape and strides of the tensor.
        threshold: 0..255.
    """

    dice: Tensor
    threshold: int

    @staticmethod
    def draw(like: Tensor, share: float) -> Drop | None:
        """A choice for a tensor of the shape, device and layout of ``like``; None if all its elements are quantized.

        One random byte decides an element, so ``share`` is rounded to multiples of 1/256.

        Raises:
            ValueError: ``share`` lies outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`share` must be in [0, 1], got {share!r}")
        threshold = round(share * 256)
        if threshold == 256:
            return None
        layout = torch.empty_like(like, dtype=torch.uint8)
        words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
        return Drop(words.view(torch.uint8).as_strided(layout.shape, layout.stride()), threshold)

    def dice_like(self, x: Tensor) -> Tensor:
        """``dice`` in the layout of x, a tensor of the same shape."""
        if self.dice.stride() == x.stride():
            return self.dice
        return torch.empty_like(x, dtype=torch.uint8).copy_(self.dice)

    def apply(self, original: Tensor, quantized: Tensor) -> Tensor:
        """``quantized`` where chosen, else ``original``: tensors of the drop's shape and one dtype, differentiable."""
        return torch.lerp(original, quantized, mask(self.dice, self.threshold, original.dtype))


def mask(dice: Tensor, threshold: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 where the dice lie below the threshold, else 0.

    Floats: a lerp with them is exact at both ends and, on CPUs, an order of magnitude faster than where.
    """
    return torch.lt(dice, threshold, out=torch.empty_like(dice, dtype=dtype))
