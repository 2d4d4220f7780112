# SPDX-License-Identifier: Apache-2.0
"""Finish quantization: every rounding decided, every quantizer on, nothing random left."""

from __future__ import annotations

import torch
from torch import nn

from ahcq_plugin.ptq.prepared import is_weight, quantizers, weight_layers
from ahcq_plugin.quantizers import AdaRoundFakeQuantize, FakeQuantize
from ahcq_plugin.support.given import check_model


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
    check_model(model)
    harden(model)
    for _, quantizer in quantizers(model):
        quantizer.finish()
    switch_on(model)
    return model


def switch_on(model: nn.Module) -> None:
    """Every quantizer in the mode that a frozen one has: it quantizes everything and observes nothing."""
    for _, quantizer in quantizers(model):
        quantizer.enable_observer(False)
        quantizer.enable_fake_quant()
        quantizer.prob = 1.0
        if isinstance(quantizer, AdaRoundFakeQuantize):
            quantizer.adaround = False


def unfrozen(quantizer: FakeQuantize) -> list[str]:
    """What of a quantizer is not as ``freeze`` leaves it, a phrase each: empty when it is frozen."""
    wrong = []
    if quantizer.observing:
        wrong.append("its observer is on")
    if not quantizer.quantizing:
        wrong.append("quantization is off")
    if quantizer.prob != 1.0:
        wrong.append(f"drop mode is on: only {quantizer.prob:.0%} of the elements are quantized")
    if is_weight(quantizer) and quantizer.adaround:
        wrong.append("soft rounding is on")
    return wrong + quantizer.problems()
