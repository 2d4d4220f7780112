# SPDX-License-Identifier: Apache-2.0
"""Replace a model's units by traced copies with fake quantizers, and switch those on and off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ahcq_plugin.graph import find_units, place, prepared_units, trace_unit
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, AdaRoundFakeQuantize, FakeQuantize

logger = logging.getLogger(__name__)


def prepare(model: nn.Module, recipe: Recipe, units: Any = None) -> nn.Module:
    """Trace every unit and put fake quantizers by role, in place; until calibrated the model computes floating point.

    Args:
        model: in eval mode; its blocks must trace with ``torch.fx``.
        units: None (found by structure), or types, module names, globs.
    Returns:
        ``model``.
    Raises:
        ValueError: no unit was found, or the model is already prepared.
        RuntimeError: a unit does not trace (named with the line that stopped the tracer); the model is then unchanged.
    """
    if prepared_units(model):
        raise ValueError("the model is already prepared; build a fresh one, or call the later stages")
    names = find_units(model, units)
    if not names:
        raise ValueError("no unit found by structure; name the blocks with `units=` (types, names or globs)")
    model.eval()
    traced = {name: trace_unit(model.get_submodule(name), name) for name in names}
    for name, unit in traced.items():
        placements = place(unit, _activation_maker(recipe), _weight_maker(recipe), recipe.share_inputs)
        for placement in placements:
            logger.debug("%s: %s", name, placement)
            quantizer = unit.get_submodule(placement.quantizer_name)
            quantizer.consumers = tuple(unit.get_submodule(layer) for layer in placement.layers)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, unit)
    return model


def _activation_maker(recipe: Recipe):
    return lambda role, site: ACTIVATION_FAMILIES[recipe.family(role)](
        quant_max=2**recipe.a_bits - 1, role=role, **recipe.quantizer_options(role)
    )


def _weight_maker(recipe: Recipe):
    return lambda layer, name: AdaRoundFakeQuantize(quant_max=2**recipe.w_bits - 1)


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """(name, fake quantizer) of every quantizer in the model."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            yield name, module


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a weight quantizer, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight_fake_quant", None), FakeQuantize)}


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, layers whose weight was transformed (ACNR) compute with the one they came with."""
    changed = [
        (layer, layer.weight.data) for layer in weight_layers(model).values() if layer.original_weight is not None
    ]
    try:
        for layer, _ in changed:
            layer.weight.data = layer.original_weight.to(layer.weight.device)
        yield
    finally:
        for layer, weight in changed:
            layer.weight.data = weight


def is_weight(quantizer: FakeQuantize) -> bool:
    """Whether the quantizer quantizes a weight."""
    return isinstance(quantizer, AdaRoundFakeQuantize)


def set_quantization(model: nn.Module, weights: bool, activations: bool | None = None) -> None:
    """Switch fake quantization on or off; with both off the prepared model computes in floating point.

    Args:
        activations: None: as ``weights``.
    """
    for _, quantizer in quantizers(model):
        quantizer.enable_fake_quant(weights if is_weight(quantizer) or activations is None else activations)
