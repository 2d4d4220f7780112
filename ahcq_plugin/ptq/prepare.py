# SPDX-License-Identifier: Apache-2.0
"""Replace a model's units by traced copies with fake quantizers, and switch those on and off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from ahcq_plugin.graph import UNIT_KEY, find_units, place, prepared_units, trace_unit
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, AdaRoundFakeQuantize, FakeQuantize

logger = logging.getLogger(__name__)


def prepare_unit(
    unit: fx.GraphModule,
    recipe: Recipe,
    families: Mapping[str, type[FakeQuantize]] = ACTIVATION_FAMILIES,
    weight_quantizer: type[FakeQuantize] = AdaRoundFakeQuantize,
) -> fx.GraphModule:
    """Put fake quantizers by role into a traced unit, in place.

    Args:
        families: name of a family -> class of its quantizers.
    Returns:
        ``unit``.
    Raises:
        ValueError: the unit has quantizers already, or holds something that cannot be quantized.
    """
    name = unit.meta.get(UNIT_KEY, {}).get("name", "")
    placements = place(
        unit,
        lambda role, site: families[recipe.family(role, name)](
            quant_max=2**recipe.a_bits - 1, role=role, **recipe.quantizer_options(role, name)
        ),
        lambda layer, _: weight_quantizer(quant_max=2**recipe.w_bits - 1),
        recipe.share_inputs,
    )
    for placement in placements:
        logger.debug("%s", placement)
        quantizer = unit.get_submodule(placement.quantizer_name)
        quantizer.consumers = tuple(unit.get_submodule(layer) for layer in placement.layers)
    return unit


#: What gives a traced unit its quantizers, and returns the unit to use; a toolkit may bring its own.
UnitPreparer = Callable[[fx.GraphModule, Recipe], fx.GraphModule]


def prepare(
    model: nn.Module, recipe: Recipe, units: Any = None, prepare_unit: UnitPreparer = prepare_unit
) -> nn.Module:
    """Trace every unit and put fake quantizers by role, in place; until calibrated the model computes floating point.

    Args:
        model: in eval mode; its blocks must trace with ``torch.fx``.
        units: None (found by structure), or types, module names, globs.
        prepare_unit: puts quantizers into a traced unit.
    Returns:
        ``model``.
    Raises:
        ValueError: no unit was found, or the model is already prepared.
        UnitError: a unit does not trace (named with the line that stopped the tracer).
    On errors the model keeps its units as they were.
    """
    if prepared_units(model):
        raise ValueError("the model is already prepared; build a fresh one, or call the later stages")
    names = find_units(model, units)
    if not names:
        raise ValueError("no unit found by structure; name the blocks with `units=` (types, names or globs)")
    model.eval()
    traced = {name: trace_unit(model.get_submodule(name), name) for name in names}
    prepared = {name: prepare_unit(unit, recipe) for name, unit in traced.items()}
    for name, unit in prepared.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, unit)
    return model
