# SPDX-License-Identifier: Apache-2.0
"""The one-call API: ``quantize``, ``save_quantized`` for its result, ``load_quantized`` for what they wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.graph import RoleTable, describe
from ahcq_plugin.ptq import audit, calibrate, freeze, precondition, prepare, reconstruct
from ahcq_plugin.ptq.audit import AuditError, AuditReport
from ahcq_plugin.ptq.checkpoint import (
    CALIBRATED_FILE,
    QUANTIZED_FILE,
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_packed,
)
from ahcq_plugin.ptq.coverage import Coverage
from ahcq_plugin.ptq.features import FeatureForward
from ahcq_plugin.ptq.precondition import ConditionReport, original_tensors, restore_originals
from ahcq_plugin.ptq.prepare import UnitPreparer, prepare_unit
from ahcq_plugin.ptq.prepared import resizing, weight_layers
from ahcq_plugin.ptq.recipe import Recipe, current_names
from ahcq_plugin.ptq.resume import (
    ResumeError,
    UnitReport,
    check_kept,
    determining,
    fingerprint,
    fitting,
    read_kept,
)
from ahcq_plugin.ptq.tune import FEATURES_FILE, TUNED_FILE, Loss, TuneReport, check_loss, floating_outputs, tune
from ahcq_plugin.quantizers.layers import held_weight
from ahcq_plugin.support.batches import (
    Forward,
    blaming,
    check_batches,
    default_forward,
    model_device,
    run_first,
    to_device,
)
from ahcq_plugin.support.checked import check_plain, save_checked
from ahcq_plugin.support.files import check_work_dir, given_path
from ahcq_plugin.support.given import check_flag, check_function, check_mapping, check_model, check_usable
from ahcq_plugin.support.state import check_changeable, check_finite, check_valued, copied, load_state
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.workers import ALONE, Workers

#: What a run keeps of its calibration.
_CALIBRATED = {"fingerprint": str, "recipe": dict, "state": dict, "originals": dict, "conditions": list}
_CONDITION = {"layer": str, "before": float, "after": float}

#: Builds the floating-point model that a quantized ``state_dict`` belongs to, with any weights.
Builder = Callable[[Mapping[str, Tensor]], nn.Module]


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
        tuning: what tuning through the output did; None without it.
        feature_tuning: what tuning through features did before.
        unrounded: name in the ``state_dict`` -> weight of quantized layers as it was calibrated, before rounding, on
            the CPU; with several ``workers`` the first has them. Not part of ``to_dict``.
    """

    recipe: Recipe
    audit: AuditReport
    units: list[UnitReport]
    conditions: list[ConditionReport]
    roles: RoleTable
    coverage: Coverage
    stages: dict[str, dict[str, float]]
    tuning: TuneReport | None
    feature_tuning: TuneReport | None
    unrounded: dict[str, Tensor] = field(repr=False)

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
            "tuning": None if self.tuning is None else asdict(self.tuning),
            "feature_tuning": None if self.feature_tuning is None else asdict(self.feature_tuning),
        }


def quantize(
    model: nn.Module,
    batches: Sequence[Any],
    recipe: str | Mapping[str, Any] | Recipe = "ahcq",
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
    checkpoint: str = QUANTIZED_FILE,
    loss: Loss | None = None,
    tune_batches: Sequence[Any] | None = None,
) -> tuple[nn.Module, QuantReport]:
    """Quantize a model after training: prepare, precondition, calibrate, reconstruct, freeze, tune, audit.

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
        checkpoint: name of that file in ``work_dir``; it is written when the audit has passed.
        leave: names or globs of what inside units may stay in floating point (see :func:`ahcq_plugin.ptq.prepare`).
        prepare_unit: gives a traced unit its quantizers; ``ahcq_plugin.mqbench.prepare_unit`` has MQBench do it.
        loss: ``loss(output, floating-point output)`` of an item, what a recipe with ``tune_steps`` minimises; default
            :func:`ahcq_plugin.ptq.loss.model_error`, of masks where the model returns a SAM's.
        tune_batches: the items of a recipe with ``tune_steps`` or ``tune_feature_steps``; default: ``batches``.
    Returns:
        (the quantized model, QuantReport)
    Raises:
        ValueError, TypeError: bad arguments, weights that are not finite, before anything is computed.
        ResumeError: the interrupted run was another; a ValueError.
        UnitError: a unit does not trace, is never reached, or its values are not finite; a RuntimeError.
        AuditError: the audit failed; a RuntimeError.
    """
    given = {"w_bits": w_bits, "a_bits": a_bits, "iterations": iterations, "seed": seed}
    check_model(model)
    recipe = Recipe.from_config(recipe, **{key: value for key, value in given.items() if value is not None})
    check_batches(batches)
    if tune_batches is not None:
        check_batches(tune_batches, "tune_batches")
    tune_batches = batches if tune_batches is None else tune_batches
    check_mapping(notes or {}, "notes")
    check_plain(notes or {}, "notes")
    recipe.check_machine()
    for name, value in {"resume": resume, "inplace": inplace, "progress": progress}.items():
        check_flag(value, name)
    for name, function in {"forward": forward, "loss": loss, "prepare_unit": prepare_unit}.items():
        if function is not None:
            check_function(function, name)
    if not isinstance(workers, Workers):
        raise TypeError(f"`workers` must be Workers, got {workers!r:.60}")
    if work_dir is not None:
        work_dir = given_path(work_dir, "work_dir")
        if workers.is_first:
            check_work_dir(work_dir)
        if not isinstance(checkpoint, str) or checkpoint in ("", ".", "..") or Path(checkpoint).name != checkpoint:
            raise ValueError(f"`checkpoint` must be the name of a file in `work_dir`, got {checkpoint!r:.60}")
    elif resume:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    check_valued(model)
    model = model if inplace else copied(model)
    if device is not None:
        model.to(check_usable(device))
    device, stages = model_device(model), Stopwatch()
    check_changeable(model)
    check_finite(model)
    forward, progress = forward or default_forward, progress and workers.is_first
    with stages("prepare", device):
        prepare(model, recipe, units, prepare_unit, leave, run=lambda model: run_first(model, batches, forward))
    run = _Run(model, batches, recipe, forward, None if work_dir is None else Path(work_dir), progress, workers, stages)
    if run.work_dir is not None and not resume and workers.is_first:
        for name in (TUNED_FILE, FEATURES_FILE):  # who resumes this run must not find an earlier one's
            (run.work_dir / name).unlink(missing_ok=True)
    targets: list[Any] = []
    features, feature_targets = None, list[Any]()
    if recipe.tune_feature_steps:
        with stages("targets", device):
            first = to_device(tune_batches[0], device)
            features = FeatureForward(model, recipe.tune_feature_units, forward, first)
            feature_targets = floating_outputs(model, tune_batches, features, progress)
    if recipe.tune_steps:
        with stages("targets", device):
            targets = floating_outputs(model, tune_batches, forward, progress)
            if loss is not None:
                check_loss(loss, targets[0])
    conditions = run.calibrate(resume)
    unrounded = _unrounded_weights(model) if workers.is_first else {}
    with stages("reconstruct", device):
        reports = reconstruct(model, batches, recipe, forward, work_dir, resume, progress, workers)
    with stages("freeze", device):
        freeze(model)
    tuning = feature_tuning = None
    kept = (work_dir, resume, progress, workers)
    if features is not None:
        with stages("tune_features", device):
            own = recipe.of_features()
            feature_tuning = tune(model, tune_batches, feature_targets, own, features, None, *kept, FEATURES_FILE)
    if recipe.tune_steps:
        with stages("tune", device):
            tuning = tune(model, tune_batches, targets, recipe, forward, loss, *kept)
    with stages("audit", device):
        outcome = audit(model, batches[0], forward, recipe)
    if not outcome.passed:
        raise AuditError(outcome)
    report = QuantReport(
        *(recipe, outcome, reports, conditions, describe(model), outcome.coverage, stages.records),
        *(tuning, feature_tuning, unrounded),
    )
    if work_dir is not None and workers.is_first:
        extra = {"report": report.to_dict(), "notes": dict(notes or {})}
        save_checkpoint(Path(work_dir) / checkpoint, model, recipe, extra)
    return model, report


def save_quantized(
    model: nn.Module,
    path: str | Path,
    outside: str = "float32",
    report: QuantReport | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a frozen model at the size that its bits promise, ``quantized.safetensors``; :mod:`ahcq_plugin.ptq.packed`
    has the layout.

    Weights of quantized layers are codes of 2 to 8 bits without gaps and are read back bit for bit, as are all floats
    inside units and all quantizers. The file is written atomically, has a digest, and holds no code.

    Args:
        model: what ``quantize`` returned or ``freeze`` froze.
        outside: floats outside of the units as ``float32``, bit for bit, or ``float16``, rounded.
        report: of ``quantize``, kept in the file with ``notes``, plain values; without its roles, which ``describe``
            gives of the loaded model.
    Raises:
        ValueError: the model is not frozen, a weight is off its grid, a float that float16 cannot hold.
    """
    from ahcq_plugin.zoo.rebuild import built_as

    check_model(model)
    path = given_path(path)
    if report is not None and not isinstance(report, QuantReport):
        raise TypeError(f"`report` must be the QuantReport of `quantize`, got {report!r:.60}")
    check_mapping(notes or {}, "notes")
    check_plain(notes or {}, "notes", tensors=False)
    kept = None if report is None else report.to_dict()
    for key in ("roles", "recipe") if kept else ():  # the file holds the model and its recipe anyway
        kept.pop(key)
    extra = {"report": kept, "notes": dict(notes or {})}
    save_packed(path, model, extra, outside, built_as(model))


def load_quantized(path: str | Path, build: Builder | None = None) -> nn.Module:
    """The quantized model of a file that ``save_quantized`` or ``quantize`` wrote, on the CPU; the file is read once.

    Args:
        path: ``quantized.safetensors`` or ``quantized.pth``; the content says which, not the name.
        build: gets the file's ``state_dict`` and returns the floating-point model that was quantized, freshly built,
            with any weights: ``lambda state: build_sam("vit_b", checkpoint=False)``. None: the model of
            ``ahcq_plugin.zoo`` that the packed file names, else the SAM or SAM 2 of the zoo whose shapes these are.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a quantized checkpoint, of no model of the zoo (then give ``build``), or of another model than
            ``build`` returned.
    """
    path = given_path(path)
    if build is not None:
        check_function(build, "build")
    checkpoint = read_checkpoint(path)
    if build is None:
        model = _of_the_zoo(checkpoint)
    else:
        with blaming(f"`build` fails on the state of {path}"):
            model = build(checkpoint.state)
    check_model(model, "build(state)")
    return checkpoint.load_into(model)


def _of_the_zoo(checkpoint: Checkpoint) -> nn.Module:
    from ahcq_plugin.zoo.rebuild import rebuild, rebuild_from_state  # here, so that the engine alone needs no SAM

    try:
        return rebuild_from_state(checkpoint.state) if checkpoint.built is None else rebuild(checkpoint.built)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}; give `build`, which builds the model that it is of") from error


def _unrounded_weights(model: nn.Module) -> dict[str, Tensor]:
    names = dict.fromkeys(held_weight(name, layer)[0] for name, layer in weight_layers(model).items())
    return {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}


@dataclass(frozen=True)
class _Run:
    """A prepared model and how it is quantized."""

    model: nn.Module
    batches: Sequence[Any]
    recipe: Recipe
    forward: Forward
    work_dir: Path | None
    progress: bool
    workers: Workers
    stages: Stopwatch

    def calibrate(self, resume: bool) -> list[ConditionReport]:
        """Precondition and calibrate, or load what the interrupted run had (``reconstruct`` checks that it fits)."""
        path, mark = None, ""
        if self.work_dir is not None:
            path, mark = self.work_dir / CALIBRATED_FILE, fingerprint(self.model, self.batches, self.recipe)
        if self.workers.first(resume and path.exists()):
            return self._load(path, mark)
        device = model_device(self.model)
        with self.stages("precondition", device):
            conditions = precondition(self.model, self.batches, self.recipe, self.forward, self.progress, self.workers)
        with self.stages("calibrate", device):
            calibrate(self.model, self.batches, self.forward, self.progress, self.workers)
        self.workers.copy([*self.model.state_dict().values(), *original_tensors(self.model).values()])
        if path is not None and self.workers.is_first:
            self._save(path, mark, conditions)
        return conditions

    def _save(self, path: Path, mark: str, conditions: list[ConditionReport]) -> None:
        content = {
            "fingerprint": mark,
            "recipe": self.recipe.to_dict(),
            "state": self.model.state_dict(),
            "originals": original_tensors(self.model),
            "conditions": [asdict(layer) for layer in conditions],
        }
        save_checked(content, path)

    def _load(self, path: Path, mark: str) -> list[ConditionReport]:
        with self.stages("calibrate", model_device(self.model)):
            saved = read_kept(path, _CALIBRATED)
            conditions = [check_kept(layer, _CONDITION, path) for layer in saved["conditions"]]
            if saved["fingerprint"] != mark:
                settings, before = determining(self.recipe), current_names(saved["recipe"])
                changed = sorted(key for key, value in settings.items() if before.get(key) != value)
                what = f"the recipe changed ({', '.join(changed)})" if changed else "the model or the data changed"
                raise ResumeError(
                    f"cannot resume from {self.work_dir}: {what}; use a new work dir, or start without resume"
                )
            load_state(self.model, saved["state"], str(path), "this model", resizing(self.model))
            with fitting(path):
                restore_originals(self.model, saved["originals"])
            return [ConditionReport(**layer) for layer in conditions]
