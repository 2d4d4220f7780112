# SPDX-License-Identifier: Apache-2.0
"""Replace a model's units by traced copies with fake quantizers, and switch those on and off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ahcq_plugin.graph import UNIT_KEY, UncoveredError, UnitError, find_units, place, prepared_units, trace_unit
from ahcq_plugin.graph.allowed import listed, name_matches, node_name
from ahcq_plugin.graph.calls import Call, Calls, record_calls
from ahcq_plugin.graph.questions import drop_idle_questions
from ahcq_plugin.ptq.coverage import OUTSIDE, cover
from ahcq_plugin.ptq.positions import layer_positions
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.ptq.recipe import Recipe, check_recipe
from ahcq_plugin.ptq.shared import check_shared
from ahcq_plugin.ptq.static import unquantized
from ahcq_plugin.ptq.traced import check_traced
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, AdaRoundFakeQuantize, FakeQuantize
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.given import check_function, check_model

logger = logging.getLogger(__name__)
#: Share of the weights. SAM-B has 5 %, the small SAM 11 %; a model whose MLPs were not found has half and more.
OUTSIDE_WORTH_A_WARNING = 0.3


def prepare_unit(
    unit: fx.GraphModule,
    recipe: Recipe,
    families: Mapping[str, Callable[..., FakeQuantize]] = ACTIVATION_FAMILIES,
    weight_quantizer: Callable[..., FakeQuantize] = AdaRoundFakeQuantize,
) -> fx.GraphModule:
    """Put fake quantizers by role into a traced unit, in place.

    Args:
        families: name of a family -> class or factory of its quantizers.
        weight_quantizer: class or factory of the weights' quantizers.
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
    model: nn.Module,
    recipe: Recipe,
    units: Any = None,
    prepare_unit: UnitPreparer = prepare_unit,
    leave: Sequence[str] = (),
    run: Callable[[nn.Module], Any] | None = None,
    calls: Mapping[str, Call] | None = None,
) -> nn.Module:
    """Trace every unit and put fake quantizers by role, in place; until calibrated the model computes floating point.

    Args:
        model: in eval mode; its blocks must trace with ``torch.fx``.
        units: None (found by structure), or types, module names, globs.
        prepare_unit: puts quantizers into a traced unit.
        leave: names or globs of modules, tensors and graph nodes inside units that may stay in floating point although
            they multiply; everything else that does is refused. ``coverage`` shows them.
        run: ``run(model)`` runs the model on an item of data. Units are then traced as they are called in it, and each
            must give what its block gives. None: units are traced with the defaults of their arguments.
        calls: instead of ``run``, how the units were called when the model was prepared for the first time.
    Returns:
        ``model``.
    Raises:
        ValueError: no unit was found, the model is already prepared, an entry of ``leave`` or one that was added to the
            recipe's ``without`` matches nothing, or its ``quantize_positions`` finds none.
        UncoveredError: a unit computes something in floating point that is neither allowed nor named in ``leave`` (with
            its line).
        UnitError: a unit does not trace (named with the line that stopped the tracer), or its trace gives other
            outputs than the block.
    On errors the model keeps its units as they were.
    """
    check_model(model)
    check_recipe(recipe)
    check_function(prepare_unit, "prepare_unit")
    if run is not None:
        check_function(run, "run")
    _check_names(leave)
    if prepared_units(model):
        raise ValueError("the model is already prepared; build a fresh one, or call the later stages")
    model.eval()
    recorded = Calls(calls or {}, {}) if run is None else record_calls(model, partial(run, model))
    names = find_units(model, units, recorded)
    if not names:
        raise ValueError("no unit found by structure; name the blocks with `units=` (types, names or globs)")
    for name in names:
        if name in recorded.problems:
            raise UnitError(f"unit '{name}' {recorded.problems[name]}: leave it out with `units=`")
    traced = {name: trace_unit(model.get_submodule(name), name, leave, recorded.by_name.get(name)) for name in names}
    for name, unit in traced.items():
        if name in recorded.by_name:
            drop_idle_questions(unit, model.get_submodule(name), recorded.by_name[name])
    if run is not None:
        check_traced(model, traced, run)
    _check_leave(traced, leave)
    recipe.check_globs(names, "units")
    if recipe.quantize_positions:
        layer_positions(traced)
    devices = {name: _device(unit, model) for name, unit in traced.items()}
    prepared = {name: prepare_unit(unit, recipe) for name, unit in traced.items()}
    if not all(isinstance(unit, fx.GraphModule) for unit in prepared.values()):
        raise TypeError("`prepare_unit` must return the unit that it was given, with quantizers")
    check_shared(prepared, recipe)
    for name, unit in prepared.items():
        for inner, quantizer in quantizers(unit):
            if quantizer.family == "cag":
                widths = [layer.in_features for layer in quantizer.consumers if isinstance(layer, nn.Linear)]
                recipe.check_channels(min(widths, default=recipe.cag_groups), f"what {name}.{inner} quantizes")
    for name, unit in prepared.items():
        unit.meta[UNIT_KEY]["recipe"] = recipe.to_dict()
        for _, quantizer in quantizers(unit):
            quantizer.to(devices[name])
    problems = [f"{name}.{problem}" for name, unit in prepared.items() for problem in unquantized(unit)]
    if problems:
        raise UncoveredError(
            f"the audit would refuse this model: {listed(problems)}; name it in `leave=`, or change `units=`"
        )
    replaced = {model.get_submodule(name): unit for name, unit in prepared.items()}
    for path, module in list(model.named_modules(remove_duplicate=False)):  # every path to a block that is used twice
        if module in replaced:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced[module])
    _tell_what_is_outside(model)
    return model


def _device(unit: nn.Module, model: nn.Module) -> torch.device | None:
    """Where a unit's quantizers belong; None: where they are, of weights without values."""
    parameters = read_parameters(unit) or list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    return None if device.type == "meta" else device


def _tell_what_is_outside(model: nn.Module) -> None:
    """A part that structure did not find is no error, but nobody should overlook it."""
    coverage = cover(model)
    share = coverage.share(OUTSIDE)
    if share > OUTSIDE_WORTH_A_WARNING:
        parts = [part for part in coverage.parts if part.kind == OUTSIDE]
        logger.warning(
            "%.0f %% of the weights lie outside of the %d units, in floating point: %s; `units=` chooses others",
            100 * share,
            len(prepared_units(model)),
            ", ".join(f"{part.name} ({part.weights:,})" for part in parts[:5]),
        )


def left_in(model: nn.Module) -> list[str]:
    """What the caller of ``prepare`` let stay in floating point inside the units of ``model``."""
    return list(
        dict.fromkeys(e for unit in prepared_units(model).values() for e in unit.meta[UNIT_KEY].get("leave", ()))
    )


def calls_of(model: nn.Module) -> dict[str, Call]:
    """How the units of a prepared model were called when they were traced; those traced without a call are missing."""
    found = {name: unit.meta[UNIT_KEY].get("call") for name, unit in prepared_units(model).items()}
    return {name: call for name, call in found.items() if call is not None}


def recipe_in(model: nn.Module) -> Recipe:
    """The recipe that the units of ``model`` were prepared with.

    Raises:
        ValueError: there is no unit, or units were prepared with different recipes.
    """
    recipes = [unit.meta[UNIT_KEY].get("recipe") for unit in prepared_units(model).values()]
    if not recipes or any(recipe is None or recipe != recipes[0] for recipe in recipes):
        raise ValueError(
            f"a prepared model has units of one recipe; here {len(recipes)} units have none or different recipes: "
            "prepare them with one"
        )
    return Recipe.from_config(recipes[0])


def _check_names(leave: Any) -> None:
    if not isinstance(leave, (list, tuple)) or not all(isinstance(entry, str) for entry in leave):
        raise TypeError(f"`leave` takes a list of names and globs, got {leave!r:.80}")


def _check_leave(units: Mapping[str, fx.GraphModule], leave: Sequence[str]) -> None:
    names = [(node_name(node), unit) for unit, gm in units.items() for node in gm.graph.nodes]
    for entry in leave:
        if not any(name_matches(entry, name, unit) for name, unit in names):
            raise ValueError(f"`leave` entry {entry!r} matches nothing in the units {', '.join(list(units)[:4])}")
