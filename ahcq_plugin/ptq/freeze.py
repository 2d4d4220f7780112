# SPDX-License-Identifier: Apache-2.0
"""Finish quantization: every rounding decided, every quantizer on, nothing random left."""

from __future__ import annotations

import torch
from torch import nn

from ahcq_plugin.ptq.prepared import quantizers, weight_layers


@torch.no_grad()
def harden(model: nn.Module) -> None:
    """Put every weight on its grid: the learned rounding where one was learned, else nearest."""
    for layer in weight_layers(model).values():
        quantizer = layer.weight_fake_quant
        layer.weight.copy_(quantizer.get_hard_value(layer.weight))
        quantizer.adaround = False
        layer.original_weight = None


def freeze(model: nn.Module) -> nn.Module:
    """Hard-round all weights, give all quantizers their final form and switch them on, observers and drop mode off, in
    place. Idempotent."""
    harden(model)
    for _, quantizer in quantizers(model):
        quantizer.finish()
        quantizer.enable_observer(False)
        quantizer.enable_fake_quant()
        quantizer.prob = 1.0
    return model
