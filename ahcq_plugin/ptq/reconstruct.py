# SPDX-License-Identifier: Apache-2.0
"""Reconstruction: unit by unit, each learns to give the floating-point output from quantized inputs. Resumable."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.optimise import Samples, optimise
from ahcq_plugin.ptq.prepared import original_weights, quantizers, set_quantization, watched, weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.refit import refit
from ahcq_plugin.ptq.resume import UnitFiles, UnitReport, fingerprint
from ahcq_plugin.ptq.store import Store
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.support.batches import Forward, check_batches, default_forward
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)
OnStep = Callable[[Tensor], None]
LOSS_EVERY = 10  # steps; to show it waits for the device


def reconstruct(
    model: nn.Module,
    batches: Sequence[Any],
    recipe: Recipe,
    forward: Forward | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    workers: Workers = ALONE,
) -> list[UnitReport]:
    """Reconstruct every unit of a prepared and calibrated model, in place; afterwards all weights are hard-rounded.

    With ``work_dir`` each finished unit is saved atomically under ``work_dir/units``; with ``resume`` finished units
    are loaded instead of computed again, and the result equals that of an uninterrupted run.

    Args:
        batches: the calibration items, the same on resume.
        workers: processes that share each step's ``batch_size`` items (see ``optimise``); ``work_dir`` is one folder
            that all of them see.
    Returns:
        One report per unit, in order of execution.
    Raises:
        ResumeError: ``resume`` finds units saved for another model, data or recipe.
    """
    check_batches(batches)
    if resume and work_dir is None:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    folder = Path(work_dir) if work_dir is not None else None
    mark = "" if folder is None else fingerprint(model, batches, recipe)
    files = UnitFiles(folder and folder / "units", mark, resume, workers)
    caches = _start(folder, files, workers)
    stream = UnitStream(model, batches, forward or default_forward, recipe.cache_device, caches)
    steps = {name: _steps(stream.units[name], recipe) for name in stream.order}
    reports: list[UnitReport] = []
    with closing(stream), tqdm(total=sum(steps.values()), unit="it", disable=not progress) as bar:
        for number, name in enumerate(stream.order, 1):
            bar.set_description(f"unit {number}/{len(stream.order)} {name}")
            stream.collect(name)
            unit = stream.units[name]
            report = files.load(number, name, unit)
            if report is not None:
                bar.update(steps[name])
            else:
                report = _reconstruct_unit(stream, name, recipe, _shown_on(bar), workers)
                workers.copy(unit.state_dict().values())
                files.save(number, unit, report)
            logger.info("%s: error %.3e -> %.3e, %.1f s", name, report.error_before, report.error_after, report.seconds)
            reports.append(report)
            stream.advance(name)
    return reports


def _start(work_dir: Path | None, files: UnitFiles, workers: Workers) -> Path | None:
    """Clear the work dir of what an earlier run left; where in it the stream's caches go."""
    caches = work_dir and work_dir / "unit_caches"
    files.start()
    if caches is not None and workers.is_first:
        shutil.rmtree(caches, ignore_errors=True)  # what a killed run left
    workers.wait()
    return caches


def _steps(unit: nn.Module, recipe: Recipe) -> int:
    return {"none": 0, "unit": 1, "layer": len(weight_layers(unit))}[recipe.granularity] * recipe.iterations


def _shown_on(bar: tqdm) -> OnStep:
    def on_step(error: Tensor) -> None:
        bar.update()
        if not bar.disable and bar.n % LOSS_EVERY == 0:
            bar.set_postfix(loss=f"{float(error):.4g}", refresh=False)

    return on_step


def _reconstruct_unit(stream: UnitStream, name: str, recipe: Recipe, on_step: OnStep, workers: Workers) -> UnitReport:
    unit = stream.units[name]
    before = _unit_error(stream, name)
    start = time.perf_counter()
    if recipe.refit:
        refit(stream, name, recipe.refit, workers)
    if recipe.granularity == "unit":
        samples = Samples(len(stream.samples), stream.inputs, lambda i: stream.target(name, i))
        optimise(unit, name, samples, recipe, on_step, workers)
    elif recipe.granularity == "layer":
        _optimise_layers(stream, name, recipe, on_step, workers)
    for _, quantizer in quantizers(unit):  # later units are to see it as it will be
        quantizer.finish()
    seconds = time.perf_counter() - start
    return UnitReport(name, before, _unit_error(stream, name), _steps(unit, recipe), seconds)


@torch.no_grad()
def _unit_error(stream: UnitStream, name: str) -> float:
    unit = stream.units[name]
    set_quantization(unit, True)
    errors = []
    for sample in range(len(stream.samples)):
        args, kwargs = stream.inputs("quantized", sample)
        errors.append(relative_error(unit(*args, **kwargs), stream.target(name, sample)))
    return sum(errors) / len(errors)


def _optimise_layers(stream: UnitStream, name: str, recipe: Recipe, on_step: OnStep, workers: Workers) -> None:
    """AdaRound's order: one layer after another, each on the input it gets from the layers rounded before it.

    All floating-point outputs are recorded first, while no weight has been rounded yet.
    """
    unit, samples = stream.units[name], range(len(stream.samples))
    targets, seen = stream.new_store(), stream.new_store()
    try:
        _keep_layer_outputs(stream, unit, targets)
        for layer_name, layer in weight_layers(unit).items():
            set_quantization(unit, True, recipe.quantize_activations)
            for sample in samples:
                args, _ = _record(unit, {layer_name: layer}, *stream.inputs("quantized", sample))[layer_name]
                seen[sample] = args
            of_layer = Samples(
                len(samples),
                lambda _, i: (seen.get(i, stream.device), {}),
                lambda i, key=layer_name: targets.get((key, i), stream.device),
            )
            optimise(layer, f"{name}.{layer_name}", of_layer, recipe, on_step, workers)
    finally:
        targets.clear()
        seen.clear()


def _keep_layer_outputs(stream: UnitStream, unit: nn.Module, targets: Store) -> None:
    """Put the floating-point output of every layer of the collected unit into ``targets``, by (layer, sample)."""
    set_quantization(unit, False)
    with original_weights(unit):
        for sample in range(len(stream.samples)):
            outputs = _record(unit, weight_layers(unit), *stream.inputs("floating", sample))
            for layer, (_, out) in outputs.items():
                targets[layer, sample] = out


@torch.no_grad()
def _record(
    unit: nn.Module, layers: dict[str, nn.Module], args: tuple, kwargs: dict
) -> dict[str, tuple[tuple, Tensor]]:
    """(inputs, output) of each layer while ``unit`` runs once."""
    calls: dict[str, Any] = {}
    with watched(layers, lambda key, _, x, out: calls.__setitem__(key, ((x,), out))):
        unit(*args, **kwargs)
    return calls
