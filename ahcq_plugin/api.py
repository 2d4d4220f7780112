# SPDX-License-Identifier: Apache-2.0
"""The one-call API: ``quantize``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ahcq_plugin.graph import RoleTable, describe
from ahcq_plugin.ptq import audit, calibrate, freeze, precondition, prepare, reconstruct
from ahcq_plugin.ptq.audit import AuditError, AuditReport
from ahcq_plugin.ptq.checkpoint import CALIBRATED_FILE, load_file, save_atomic, save_checkpoint
from ahcq_plugin.ptq.coverage import Coverage
from ahcq_plugin.ptq.precondition import ConditionReport, original_tensors, restore_originals
from ahcq_plugin.ptq.prepare import UnitPreparer, prepare_unit
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.reconstruct import UnitReport, fingerprint
from ahcq_plugin.support.batches import Forward, check_batches, default_forward, model_device
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.workers import ALONE, Workers


@dataclass(frozen=True)
class QuantReport:
    """What ``quantize`` did.

    Attributes:
        recipe: the recipe used.
        audit: passed, or ``quantize`` would have raised.
        units: error of every unit before and after reconstruction.
        conditions: condition numbers of Linear weights before and after ACNR (empty without it).
        roles: the table unit, tensor, role, quantizer.
        coverage: how much computes on integers, and by name what does not.
        stages: stage -> {"seconds", "peak_bytes"}.
    """

    recipe: Recipe
    audit: AuditReport
    units: list[UnitReport]
    conditions: list[ConditionReport]
    roles: RoleTable
    coverage: Coverage
    stages: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "audit": self.audit.to_dict(),
            "units": [asdict(unit) for unit in self.units],
            "conditions": [asdict(layer) for layer in self.conditions],
            "roles": [asdict(row) for row in self.roles.rows],
            "coverage": self.coverage.to_dict(),
            "stages": self.stages,
        }


def quantize(
    model: nn.Module,
    batches: Sequence[Any],
    recipe: str | Mapping[str, Any] | Recipe = "qdrop",
    w_bits: int | None = None,
    a_bits: int | None = None,
    units: Any = None,
    forward: Forward | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    inplace: bool = False,
    progress: bool = True,
    prepare_unit: UnitPreparer = prepare_unit,
    workers: Workers = ALONE,
    notes: Mapping[str, Any] | None = None,
    leave: Sequence[str] = (),
) -> tuple[nn.Module, QuantReport]:
    """Quantize a model after training: prepare, precondition, calibrate, reconstruct, freeze, audit.

    Args:
        model: floating point; its repeated blocks must trace with ``torch.fx``.
        batches: sequence of calibration items.
        recipe: name, ``{"name": ..., key: value}`` or Recipe; ``w_bits``, ``a_bits``, ``iterations``, ``seed`` override
            its keys.
        units: None: repeated modules with attention or MLP, found by structure; or types, names, globs.
        forward: ``callable(model, batch)``; default ``model(*batch)`` or ``model(**batch)``.
        device: where to compute; default: where the model is. The model stays there.
        work_dir: folder for the state of the run and ``quantized.pth``; needed for ``resume``.
        resume: go on with an interrupted run in ``work_dir``; the result equals an uninterrupted run's.
        inplace: change ``model`` itself instead of a copy.
        workers: processes that quantize together: ``Workers.running()`` in each of those that a launcher started, with
            the same arguments otherwise. All of them see ``work_dir``; the first writes.
        notes: plain values to keep in ``quantized.pth``.
        leave: names or globs of what inside units may stay in floating point (see :func:`ahcq_plugin.ptq.prepare`).
        prepare_unit: gives a traced unit its quantizers; ``ahcq_plugin.mqbench.prepare_unit`` has MQBench do it.
    Returns:
        (the quantized model, QuantReport)
    Raises:
        ValueError, TypeError: bad arguments, before anything is computed.
        RuntimeError: a unit does not trace; its subclass AuditError: the audit failed.
    """
    given = {"w_bits": w_bits, "a_bits": a_bits, "iterations": iterations, "seed": seed}
    recipe = Recipe.from_config(recipe, **{key: value for key, value in given.items() if value is not None})
    check_batches(batches)
    if resume and work_dir is None:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    forward = forward or default_forward
    model = model if inplace else copy.deepcopy(model)
    if device is not None:
        model.to(device)
    device = model_device(model)
    stages = Stopwatch()
    with stages("prepare", device):
        prepare(model, recipe, units, prepare_unit, leave)
    progress = progress and workers.is_first
    conditions = _calibrate(model, batches, recipe, forward, work_dir, resume, progress, stages, workers)
    with stages("reconstruct", device):
        reports = reconstruct(model, batches, recipe, forward, work_dir, resume, progress, workers)
    with stages("freeze", device):
        freeze(model)
    with stages("audit", device):
        outcome = audit(model, batches[0], forward)
    if not outcome.passed:
        raise AuditError(outcome)
    report = QuantReport(recipe, outcome, reports, conditions, describe(model), outcome.coverage, stages.records)
    if work_dir is not None and workers.is_first:
        extra = {"report": report.to_dict(), "notes": dict(notes or {})}
        save_checkpoint(Path(work_dir) / "quantized.pth", model, recipe, extra)
    return model, report


def _calibrate(
    model, batches, recipe: Recipe, forward, work_dir, resume: bool, progress: bool, stages: Stopwatch, workers: Workers
) -> list[ConditionReport]:
    """Precondition and calibrate, or load what the interrupted run had (``reconstruct`` checks that it fits)."""
    device = model_device(model)
    path, mark = None, ""
    if work_dir is not None:
        path = Path(work_dir) / CALIBRATED_FILE
        mark = fingerprint(model, batches, recipe)
    if workers.first(resume and path.exists()):
        with stages("calibrate", device):
            saved = load_file(path)
            if saved["fingerprint"] != mark:
                changed = sorted(k for k, v in recipe.to_dict().items() if saved["recipe"].get(k) != v)
                what = f"the recipe changed ({', '.join(changed)})" if changed else "the model or the data changed"
                raise ValueError(f"cannot resume from {work_dir}: {what}; use a new work dir, or start without resume")
            model.load_state_dict(saved["state"])
            restore_originals(model, saved["originals"])
            return [ConditionReport(**layer) for layer in saved["conditions"]]
    with stages("precondition", device):
        conditions = precondition(model, batches, recipe, forward, progress, workers)
    with stages("calibrate", device):
        calibrate(model, batches, forward, progress, workers)
    workers.copy([*model.state_dict().values(), *original_tensors(model).values()])
    if path is not None and workers.is_first:
        content = {
            "fingerprint": mark,
            "recipe": recipe.to_dict(),
            "state": model.state_dict(),
            "originals": original_tensors(model),
            "conditions": [asdict(layer) for layer in conditions],
        }
        save_atomic(content, path)
    return conditions
