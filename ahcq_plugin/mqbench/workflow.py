# SPDX-License-Identifier: Apache-2.0
"""MQBench's preparation of models that do not trace as a whole, and our engine on what it prepared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ahcq_plugin import ptq
from ahcq_plugin.graph import UNIT_KEY
from ahcq_plugin.graph.unit import keep_state
from ahcq_plugin.mqbench.backend import AHCQ_BACKEND, DEFAULT_RECIPE, recipe_of
from ahcq_plugin.mqbench.registration import register
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.resume import UnitReport
from ahcq_plugin.support.batches import Forward


class _Traced(fx.Tracer):
    """Gives MQBench the graph that a unit has already."""

    def trace(self, root: fx.GraphModule, concrete_args: Any = None) -> fx.Graph:
        return root.graph


@contextmanager
def _quiet() -> Iterator[None]:
    """No INFO lines of MQBench on stdout."""
    from mqbench.utils.logger import logger as host

    level = host.level
    try:
        host.setLevel(logging.WARNING)
        yield
    finally:
        host.setLevel(level)


def prepare_unit(unit: fx.GraphModule, recipe: Recipe) -> fx.GraphModule:
    """``prepare_by_platform`` on a unit that ``trace_unit`` traced; the ``prepare_unit`` of ``ahcq_plugin.quantize``.

    Returns:
        MQBench's GraphModule, with the name and the ``state_dict`` keys of ``unit`` beside those of the quantizers.
    """
    register()
    from mqbench.prepare_by_platform import prepare_by_platform

    options = {"extra_quantizer_dict": {"recipe": recipe, "prequant": [], "leave": unit.meta[UNIT_KEY]["leave"]}}
    with _quiet():
        prepared = prepare_by_platform(unit, AHCQ_BACKEND, options, custom_tracer=_Traced())
    keep_state(unit, prepared)
    prepared.meta[UNIT_KEY]["name"] = unit.meta[UNIT_KEY]["name"]
    return prepared.eval()


def prepare(model: nn.Module, recipe: Any = DEFAULT_RECIPE, units: Any = None) -> nn.Module:
    """Prepare every block of a model that does not trace as a whole, in place: ``prepare_by_platform`` on each.

    Args, Returns, Raises: as :func:`ahcq_plugin.ptq.prepare`.
    """
    return ptq.prepare(model, Recipe.from_config(recipe), units, prepare_unit)


@torch.no_grad()
def calibrate(
    model: nn.Module, cali_data: Sequence[Any], forward: Forward | None = None, progress: bool = True
) -> None:
    """Instead of ``enable_calibration`` and a loop over the data: observers start afresh, and a second pass lets HLUQ,
    LNQ and AGQ choose by the error of what follows them. Quantizers get their final form (CAG its groups), so that
    ``enable_quantization`` or ``ptq_reconstruction`` can come next.

    Args:
        cali_data: sequence of items; each goes through ``forward(model, item)`` once or twice.
    Raises:
        ValueError: ``model`` was not prepared for ``AHCQ_BACKEND``.
    """
    recipe_of(model)
    ptq.calibrate(model.eval(), cali_data, forward, progress)
    for _, quantizer in ptq.quantizers(model):
        quantizer.finish()


def reconstruct(
    model: nn.Module,
    cali_data: Sequence[Any],
    forward: Forward | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[UnitReport]:
    """Instead of calibration and ``ptq_reconstruction``: two-pass calibration, reconstruction unit by unit and hard
    rounding by our engine, in place; afterwards the model computes quantized.

    A unit is a GraphModule that MQBench prepared: ``model`` itself, or the blocks inside it. What is learned, and for
    how many iterations, stands in the recipe of ``prepare_by_platform``.

    Args, Returns: as :func:`ahcq_plugin.ptq.reconstruct`.
    Raises:
        ValueError: ``model`` was not prepared for ``AHCQ_BACKEND``, or ``resume`` finds another run.
    """
    recipe = recipe_of(model)
    ptq.calibrate(model.eval(), cali_data, forward, progress)
    reports = ptq.reconstruct(model, cali_data, recipe, forward, work_dir, resume, progress)
    ptq.freeze(model)
    return reports
