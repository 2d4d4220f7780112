# SPDX-License-Identifier: Apache-2.0
"""Reconstruction: unit by unit, each learns to give the floating-point output from quantized inputs. Resumable."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.optimise import Samples, optimise
from ahcq_plugin.ptq.prepared import original_weights, quantizers, set_quantization, watched, weight_layers
from ahcq_plugin.ptq.recipe import Recipe, check_recipe
from ahcq_plugin.ptq.refit import refit
from ahcq_plugin.ptq.response import Response, Stage, few_prompts
from ahcq_plugin.ptq.resume import UnitFiles, UnitReport, fingerprint
from ahcq_plugin.ptq.stages import Stages, find_stages
from ahcq_plugin.ptq.store import Store
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.support.batches import Forward, check_batches, default_forward, model_device
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
        One report per unit, in order of execution; with ``par`` one for the blocks of a stage, learned together.
    Raises:
        ResumeError: ``resume`` finds units saved for another model, data or recipe.
        UnitError: ``par`` finds no decoder that responds to prompts.
    """
    check_batches(batches)
    check_recipe(recipe)
    model_device(model)
    if not prepared_units(model):
        raise ValueError("the model has no quantized unit: run `prepare` and `calibrate` first")
    if resume and work_dir is None:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    folder = Path(work_dir) if work_dir is not None else None
    mark = "" if folder is None else fingerprint(model, batches, recipe)
    files = UnitFiles(folder and folder / "units", mark, resume, workers)
    caches = _start(folder, files, workers)
    learns_response = recipe.par and recipe.granularity == "unit"
    if learns_response:
        batches = few_prompts(batches, recipe.seed)
    stream = UnitStream(model, batches, forward or default_forward, recipe.cache_device, caches)
    reports: list[UnitReport] = []
    with closing(stream):
        stages = find_stages(stream) if learns_response else None
        groups = [(name,) for name in stream.order] if stages is None else stages.groups
        jobs = [_Job(stream, group, stages, recipe, workers) for group in groups]
        with tqdm(total=sum(job.steps for job in jobs), unit="it", disable=not progress) as bar:
            for number, job in enumerate(jobs, 1):
                bar.set_description(f"unit {number}/{len(jobs)} {job.name}")
                stream.collect(job.group[0])
                report = files.load(number, job.name, job.module)
                if report is not None:
                    bar.update(job.steps)
                else:
                    report = job.run(_shown_on(bar))
                    workers.copy(job.module.state_dict().values())
                    files.save(number, job.module, report)
                logger.info(
                    "%s: error %.3e -> %.3e, %.1f s", job.name, report.error_before, report.error_after, report.seconds
                )
                reports.append(report)
                stream.advance(job.group[0])
                for name in job.group[1:]:
                    stream.collect(name)
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


def _shown_on(bar: tqdm) -> OnStep:
    def on_step(error: Tensor) -> None:
        bar.update()
        if not bar.disable and bar.n % LOSS_EVERY == 0:
            bar.set_postfix(loss=f"{float(error):.4g}", refresh=False)

    return on_step


@dataclass(frozen=True)
class _Job:
    """The reconstruction of a unit, or of the units of a stage together."""

    stream: UnitStream
    group: tuple[str, ...]
    stages: Stages | None
    recipe: Recipe
    workers: Workers

    @property
    def name(self) -> str:
        """Of the unit, or of the first and the last one; random numbers depend on it."""
        return " to ".join(dict.fromkeys((self.group[0], self.group[-1])))

    @cached_property
    def module(self) -> nn.Module:
        """What is learned."""
        units = [self.stream.units[name] for name in self.group]
        return units[0] if len(units) == 1 else Stage(units)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        parts = {"none": 0, "unit": 1, "layer": len(weight_layers(self.module))}
        return parts[self.recipe.granularity] * self.recipe.iterations

    def run(self, on_step: OnStep) -> UnitReport:
        """Reconstruct; the stream has collected the first unit."""
        stream, recipe = self.stream, self.recipe
        response = None if self.stages is None else Response(stream, self.stages, self.group, self.module)
        target = partial(stream.target, self.group[0]) if response is None else response.floating
        before = self._error(target)
        start = time.perf_counter()
        if recipe.refit:
            refit(stream, self.name, recipe.refit, self.workers)
        if response is not None and response.stages.by_response(self.group):
            self._by_response(response, on_step)
        elif recipe.granularity == "unit":
            samples = Samples.of_outputs(self.module, len(stream.samples), stream.inputs, target)
            optimise(self.module, self.name, samples, recipe, on_step, self.workers)
        elif recipe.granularity == "layer":
            _optimise_layers(stream, self.name, recipe, on_step, self.workers)
        for _, quantizer in quantizers(self.module):  # later units are to see it as it will be
            quantizer.finish()
        seconds = time.perf_counter() - start
        return UnitReport(self.name, before, self._error(target), self.steps, seconds)

    def _by_response(self, response: Response, on_step: OnStep) -> None:
        targets = self.stream.new_store()
        try:
            with response.learning():
                samples = response.samples(targets)
                optimise(self.module, self.name, samples, self.recipe, on_step, self.workers)
        finally:
            targets.clear()

    @torch.no_grad()
    def _error(self, target: Callable[[int], Any]) -> float:
        set_quantization(self.module, True)
        errors = []
        for sample in range(len(self.stream.samples)):
            args, kwargs = self.stream.inputs("quantized", sample)
            errors.append(relative_error(self.module(*args, **kwargs), target(sample)))
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
            of_layer = Samples.of_outputs(
                layer,
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
