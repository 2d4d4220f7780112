# SPDX-License-Identifier: Apache-2.0
"""Weights changed before quantization: folded signs, rotated heads, centred channels, condition numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.prequant.acnr import ErrorGram, condition_weight
from ahcq_plugin.prequant.condiquant import condition_weight_isotropic
from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.ptq.center import center_heads
from ahcq_plugin.ptq.center_norms import center_norms
from ahcq_plugin.ptq.fold import fold_bimodal_keys
from ahcq_plugin.ptq.prepared import activation_quantizers, quantizers, set_quantization, watched, weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.rotate import rotate_heads
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers


@dataclass(frozen=True)
class ConditionReport:
    """Condition number (largest by smallest singular value) of a layer's weight before and after."""

    layer: str
    before: float
    after: float


@torch.no_grad()
def precondition(
    model: nn.Module,
    batches: Sequence[Any],
    recipe: Recipe,
    forward: Forward | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> list[ConditionReport]:
    """Change the weights of a prepared model as the recipe says, in place, before ``calibrate``.

    ``big``, ``rotate``, ``center`` and ``center_norms`` keep the model's function. ACNR does not: its layers keep
    ``original_weight``, the target of reconstruction. It needs the activations' quantization errors, hence quantizers:
    it calibrates them on the weights as they came; ``calibrate`` then starts afresh and overwrites all of it.
    ``workers`` share the layers; the first of them decides which keys are folded, and what is taken from keys, values
    and norms.

    Returns:
        One line per Linear weight; empty unless the recipe asks for ``acnr`` or ``condiquant``.
    """
    forward = forward or default_forward
    if recipe.big:
        fold_bimodal_keys(model, batches[0], forward, workers)
    if recipe.rotate:
        rotate_heads(model, batches[0], forward, workers)
    if recipe.center:
        center_heads(model, batches, forward, workers)
    if recipe.center_norms:
        center_norms(model, batches, forward, workers)
    if not (recipe.acnr or recipe.condiquant):
        return []
    # tables of relative positions, which read queries, are no layers of the method
    fed = {layer for _, quantizer in activation_quantizers(model) for layer in quantizer.consumers}
    layers = {n: layer for n, layer in weight_layers(model).items() if isinstance(layer, nn.Linear) and layer in fed}
    grams: dict[nn.Module, Tensor] = {}
    if recipe.acnr:
        accumulated = recipe.acnr_error == "accumulated"
        # the errors of one input alone need no other quantizer, and LNQ's search takes longest
        wanted = (lambda _: True) if accumulated else _feeds_linears
        calibrate_activations(model, batches, forward, progress, workers, wanted)
        grams = error_grams(model, batches, forward, accumulated, progress)
    names, mine = list(layers), []
    for position in tqdm(workers.share(len(names)), desc="condition weights", unit="layer", disable=not progress):
        layer = layers[names[position]]
        weight = layer.weight
        if recipe.acnr:
            result = condition_weight(
                weight,
                grams[layer],
                lam=recipe.acnr_lambda,
                beta=recipe.acnr_beta,
                energy=recipe.acnr_energy,
                steps=recipe.acnr_steps,
            )
        else:
            result = condition_weight_isotropic(weight, lam=recipe.acnr_lambda, steps=recipe.acnr_steps)
        changed = None if result.weight is weight else result.weight
        mine.append((changed, ConditionReport(names[position], result.condition_before, result.condition_after)))
    reports = []
    for layer, (changed, report) in zip(layers.values(), workers.in_order(mine, len(names)), strict=True):
        if changed is not None:
            layer.original_weight = layer.weight.detach().clone()
            layer.weight.copy_(changed)
        reports.append(report)
    return reports


def original_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The ``original_weight`` of every layer that has one, by name."""
    layers = weight_layers(model).items()
    return {name: layer.original_weight for name, layer in layers if layer.original_weight is not None}


def restore_originals(model: nn.Module, originals: dict[str, Tensor]) -> None:
    """Give the layers back what ``original_tensors`` returned."""
    for name, weight in originals.items():
        layer = model.get_submodule(name)
        layer.original_weight = weight.to(layer.weight.device)


def error_grams(
    model: nn.Module, batches: Sequence[Any], forward: Forward, accumulated: bool, progress: bool = True
) -> dict[nn.Module, Tensor]:
    """dX^T dX / rows, (in, in), for every Linear; layers with one input quantizer share the tensor.

    dX = Q(x) - x at the layer's floating-point input; ``accumulated``: floating-point input - Q(input when all
    activations before it are quantized as well).
    """
    device = model_device(model)
    grams: dict[FakeQuantize, ErrorGram] = {}
    clean: dict[FakeQuantize, list[Tensor]] = {}

    def add(quantizer: FakeQuantize, reference: Tensor, x: Tensor) -> None:
        if quantizer not in grams:
            grams[quantizer] = ErrorGram(x.shape[-1], device=x.device)
        grams[quantizer].add((quantizer.decode(quantizer.encode(x)) - reference.float()).flatten(0, -2))

    saved = [(q, q.quantizing) for _, q in quantizers(model)]
    try:
        for batch in tqdm(batches, desc="activation errors", unit="item", disable=not progress):
            item = to_device(batch, device)
            set_quantization(model, False)
            if not accumulated:
                with _inputs_of_linears(model, lambda q, x: add(q, x, x)):
                    forward(model, item)
                continue
            with _inputs_of_linears(model, lambda q, x: clean.setdefault(q, []).append(x)):
                forward(model, item)
            set_quantization(model, False, True)
            with _inputs_of_linears(model, lambda q, x: add(q, clean[q].pop(0), x)):
                forward(model, item)
    finally:
        for quantizer, flag in saved:
            quantizer.enable_fake_quant(flag)
    means = {quantizer: gram.mean() for quantizer, gram in grams.items()}
    return {layer: mean for quantizer, mean in means.items() for layer in quantizer.consumers}


def _feeds_linears(quantizer: FakeQuantize) -> bool:
    return bool(quantizer.consumers) and all(isinstance(layer, nn.Linear) for layer in quantizer.consumers)


@contextmanager
def _inputs_of_linears(model: nn.Module, handle: Callable[[FakeQuantize, Tensor], None]) -> Iterator[None]:
    """Within the context, ``handle(quantizer, x)`` is called for every quantizer that feeds Linear layers."""
    feeding = {name: quantizer for name, quantizer in activation_quantizers(model) if _feeds_linears(quantizer)}
    with watched(feeding, lambda _, quantizer, x, out: handle(quantizer, x)):
        yield
