# SPDX-License-Identifier: Apache-2.0
"""The optimisation of one module (a unit, or a layer in it): AdaRound + learned scales + QDrop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.functional.adaround import rounding_regularizer
from ahcq_plugin.ptq.freeze import harden
from ahcq_plugin.ptq.loss import channel_axis, output_error, rounding_exponent
from ahcq_plugin.ptq.prepare import is_weight, quantizers, set_quantization, weight_layers
from ahcq_plugin.ptq.recipe import Recipe

Fetch = Callable[[int], Any]
MAX_RELATIVE_STEP = 0.005


@contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on (seed, name) alone, so that a resumed run draws what an uninterrupted one draws."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


def mix(quantized: Any, floating: Any, share: float) -> Any:
    """Element-wise random mixture: ``share`` of the elements from ``quantized``, the rest from ``floating``."""

    def pick(q: Any, f: Any) -> Any:
        if not isinstance(q, Tensor) or not q.is_floating_point() or share == 1.0:
            return q
        return torch.lerp(f, q, torch.empty(q.shape, device=q.device).bernoulli_(share))

    return pytree.tree_map(pick, quantized, floating)


def scale_step(scale: Tensor, learning_rate: float) -> float:
    """Adam's step for a scale: the recipe's, but at most ``MAX_RELATIVE_STEP`` of the scale itself.

    Adam moves by about its learning rate whatever the gradient. Scales of 8-bit attention probabilities are near 0.002:
    steps that suit other scales would wipe them out.
    """
    return min(learning_rate, MAX_RELATIVE_STEP * float(scale.detach().mean()))


def optimise(
    module: nn.Module,
    name: str,
    inputs: Callable[[str, int], tuple[tuple, dict]],
    target: Fetch,
    items: int,
    recipe: Recipe,
    on_step: Callable[[float], None],
) -> None:
    """Learn the rounding of all weights in ``module`` (and activation scales, if the recipe does), then hard-round.

    Args:
        module: has fake quantizers; may itself be a quantized layer.
        inputs: ``inputs("quantized" | "floating", item)`` gives (args, kwargs) of the module.
        target: floating-point output of the module for an item.
        items: number of items.
        on_step: called with the reconstruction error after every iteration.
    """
    device = next(module.parameters()).device
    axis = channel_axis(module)
    trained_before = {p: p.requires_grad for p in module.parameters()}
    for parameter in trained_before:
        parameter.requires_grad_(False)
    set_quantization(module, True, recipe.quantize_activations)
    layers = weight_layers(module)
    alphas = []
    for layer in layers.values():
        layer.weight_fake_quant.init(layer.weight)
        alphas.append(layer.weight_fake_quant.alpha)
    optimizers = [torch.optim.Adam(alphas, lr=recipe.rounding_lr)]
    schedule = None
    activations = [q for _, q in quantizers(module) if not is_weight(q)]
    if recipe.learn_scales and activations:
        scales = [s.requires_grad_() for q in activations for s in q.learnable_scales()]
        groups = [{"params": [s], "lr": scale_step(s, recipe.scale_lr)} for s in scales]
        optimizers.append(torch.optim.Adam(groups))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], T_max=recipe.iterations)
    try:
        for quantizer in activations:
            quantizer.prob = recipe.keep_probability
        with seeded(recipe.seed, name, device), torch.enable_grad():
            for step in range(recipe.iterations):
                error = torch.zeros((), device=device)
                for item in torch.randint(items, (recipe.batch_size,)).tolist():
                    args, kwargs = mix(inputs("quantized", item), inputs("floating", item), recipe.input_mix)
                    error = error + output_error(module(*args, **kwargs), target(item), axis) / recipe.batch_size
                loss = error
                exponent = rounding_exponent(
                    step, recipe.iterations, recipe.warmup, recipe.exponent_start, recipe.exponent_end
                )
                if exponent is not None:
                    loss = loss + recipe.rounding_weight * sum(rounding_regularizer(a, exponent) for a in alphas)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                if schedule is not None:
                    schedule.step()
                for quantizer in activations:
                    quantizer.keep_valid()
                on_step(float(error.detach()))
        harden(module)
    finally:
        for quantizer in activations:
            quantizer.prob = 1.0
        for parameter, flag in trained_before.items():
            parameter.requires_grad_(flag)
