# SPDX-License-Identifier: Apache-2.0
"""Mask upscaling, which stays in floating point, one item of the batch after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ItemByItem(nn.Sequential):
    """Transposed convolutions and what is between them, whose maps of one item fit a CPU's cache and of a batch do not.

    Items do not see each other in any of these layers, so values are those of the whole batch. Other devices, and
    compiled code, take the batch at once. It can be iterated as the ``nn.Sequential`` that it replaces, as SAM 2 does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        if len(x) < 2 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return torch.cat([super(ItemByItem, self).forward(item) for item in x.split(1)])


def upscale_item_by_item(model: nn.Module) -> None:
    """Changes every plain ``nn.Sequential`` with a transposed convolution in it, in place: hooks and keys stay."""
    for module in model.modules():
        if type(module) is nn.Sequential and any(isinstance(layer, nn.ConvTranspose2d) for layer in module):
            module.__class__ = ItemByItem
