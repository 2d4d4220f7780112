# SPDX-License-Identifier: Apache-2.0
"""Reconstruction: unit by unit, each learns to give the floating-point output from quantized inputs. Resumable."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ahcq_plugin.ptq.checkpoint import load_file, save_atomic
from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.optimise import Samples, optimise
from ahcq_plugin.ptq.prepared import original_weights, quantizers, set_quantization, watched, weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.support.batches import Forward, check_batches, default_forward
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnitReport:
    """Outcome of one unit.

    Attributes:
        error_before, error_after: ||out - fp||^2 / ||fp||^2 of the unit's output, mean over all calls, everything
            quantized: rounding to nearest, and after reconstruction with all quantizers in their final form.
        seconds: of the optimisation (of the first run, when resumed).
    """

    name: str
    error_before: float
    error_after: float
    iterations: int
    seconds: float


def fingerprint(model: nn.Module, batches: Sequence[Any], recipe: Recipe) -> str:
    """Hash of what determines the result: the model's state, the items, the recipe (not where caches live)."""
    settings = {k: v for k, v in recipe.to_hash().items() if k != "cache_device"}
    return digest([settings, *(pytree.tree_map(_by_value, tree) for tree in (dict(model.state_dict()), list(batches)))])


def _by_value(leaf: Any) -> Any:
    """The leaf, or the name of its class: a hash of an object by its address would differ from run to run."""
    known = isinstance(leaf, (Tensor, np.ndarray, int, float, str, bytes, type(None)))
    return leaf if known else type(leaf).__name__


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
        ValueError: ``resume`` finds units saved for another model, data or recipe.
    """
    check_batches(batches)
    if resume and work_dir is None:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    mark = fingerprint(model, batches, recipe) if work_dir is not None else ""
    folder = Path(work_dir) / "units" if work_dir is not None else None
    caches = Path(work_dir) / "unit_caches" if work_dir is not None else None
    if folder is not None and workers.is_first:
        for stale in () if resume else folder.glob("*.pt"):
            stale.unlink()
        shutil.rmtree(caches, ignore_errors=True)  # what a killed run left
    workers.wait()
    stream = UnitStream(model, batches, forward or default_forward, recipe.cache_device, caches)
    reports: list[UnitReport] = []
    steps = {name: _steps(stream.units[name], recipe) for name in stream.order}
    bar = tqdm(total=sum(steps.values()), unit="it", disable=not progress)
    try:
        for number, name in enumerate(stream.order, 1):
            bar.set_description(f"unit {number}/{len(stream.order)} {name}")
            stream.collect(name)
            path = folder / f"{number:03d}.pt" if folder is not None else None
            there = path is not None and workers.first(resume and path.exists())
            saved = _load_unit(path, mark, name) if there else None
            if saved is None:
                report = _reconstruct_unit(stream, name, recipe, bar, workers)
                workers.copy(stream.units[name].state_dict().values())
                if path is not None and workers.is_first:
                    state = {k: v.cpu() for k, v in stream.units[name].state_dict().items()}
                    save_atomic({"fingerprint": mark, "state": state, "report": dataclasses.asdict(report)}, path)
            else:
                stream.units[name].load_state_dict(saved["state"])
                report = UnitReport(**saved["report"])
                bar.update(steps[name])
            logger.info("%s: error %.3e -> %.3e, %.1f s", name, report.error_before, report.error_after, report.seconds)
            reports.append(report)
            stream.advance(name)
    finally:
        bar.close()
        stream.close()
    return reports


def _steps(unit: nn.Module, recipe: Recipe) -> int:
    return {"none": 0, "unit": 1, "layer": len(weight_layers(unit))}[recipe.granularity] * recipe.iterations


def _load_unit(path: Path, mark: str, name: str) -> dict[str, Any]:
    saved = load_file(path)
    if saved["fingerprint"] != mark or saved["report"]["name"] != name:
        raise ValueError(
            f"cannot resume from {path}: it was made with another model, other calibration data or another recipe; "
            "use a new work dir, or start without resume"
        )
    return saved


def _reconstruct_unit(stream: UnitStream, name: str, recipe: Recipe, bar: tqdm, workers: Workers) -> UnitReport:
    unit = stream.units[name]
    before = _unit_error(stream, name)
    start = time.perf_counter()

    def on_step(error: float) -> None:
        bar.update()
        if bar.n % 10 == 0:
            bar.set_postfix(loss=f"{error:.4g}", refresh=False)

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


def _optimise_layers(stream: UnitStream, name: str, recipe: Recipe, on_step, workers: Workers) -> None:
    """AdaRound's order: one layer after another, each on the input it gets from the layers rounded before it.

    All floating-point outputs are recorded first, while no weight has been rounded yet.
    """
    unit = stream.units[name]
    layers = weight_layers(unit)
    samples = range(len(stream.samples))
    targets, seen = stream.new_store(), stream.new_store()
    try:
        set_quantization(unit, False)
        with original_weights(unit):
            for sample in samples:
                for layer, (_, out) in _record(unit, layers, *stream.inputs("floating", sample)).items():
                    targets[layer, sample] = out
        for layer_name, layer in layers.items():
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


@torch.no_grad()
def _record(
    unit: nn.Module, layers: dict[str, nn.Module], args: tuple, kwargs: dict
) -> dict[str, tuple[tuple, Tensor]]:
    """(inputs, output) of each layer while ``unit`` runs once."""
    found: dict[str, Any] = {}
    with watched(layers, lambda key, _, x, out: found.__setitem__(key, ((x,), out))):
        unit(*args, **kwargs)
    return found
