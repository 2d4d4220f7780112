# SPDX-License-Identifier: Apache-2.0
"""Seconds of one reconstruction step of a unit, forward and backward, without the rest of the engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.ptq.prepared import intercepted, is_weight, quantizers, weight_layers
from ahcq_plugin.support.batches import Forward

KEEP_PROBABILITY = 0.5


def step_seconds(unit: nn.Module, args: tuple, kwargs: Mapping[str, Any], learned: Sequence[Tensor]) -> float:
    """Median of three steps after a first one: output, mean square, gradients of ``learned``."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        loss = sum(leaf.float().square().mean() for leaf in pytree.tree_leaves(unit(*args, **kwargs)))
        torch.autograd.grad(loss, learned, allow_unused=True)
        if loss.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.no_grad()
def unit_inputs(model: nn.Module, item: Any, names: Sequence[str], forward: Forward) -> dict[str, tuple[tuple, dict]]:
    """(args, kwargs) of the units ``names`` in one run of the model."""
    seen: dict[str, tuple[tuple, dict]] = {}

    def note(name, unit_forward, args, kwargs):
        seen[name] = args, kwargs
        return unit_forward(*args, **kwargs)

    with intercepted({name: model.get_submodule(name) for name in names}, note):
        forward(model, item)
    return seen


def start_learning(unit: nn.Module) -> list[Tensor]:
    """Put a calibrated unit, quantization on, into the state of reconstruction (QDrop's); what it would learn."""
    layers = weight_layers(unit).values()
    for layer in layers:
        layer.weight_fake_quant.init(layer.weight)
    activations = [q for _, q in quantizers(unit) if not is_weight(q)]
    for quantizer in activations:
        quantizer.prob = KEEP_PROBABILITY
    return [layer.weight_fake_quant.alpha for layer in layers] + [s for q in activations for s in q.learnable_scales()]
