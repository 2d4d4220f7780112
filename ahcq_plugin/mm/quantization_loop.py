# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization as a test loop: what runs on images and runs on videos have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import BaseLoop
from torch import nn

from ahcq_plugin import QuantReport, quantize, save_quantized
from ahcq_plugin.graph import find_units
from ahcq_plugin.mm.box_prompted_sam import build_sam_from_config
from ahcq_plugin.mm.report.data import ReportData
from ahcq_plugin.mm.report.page import write_report
from ahcq_plugin.mm.toolkits import unit_preparer
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.checkpoint import QUANTIZED_FILE
from ahcq_plugin.ptq.distributions import collect_distributions
from ahcq_plugin.ptq.packed import PACKED_FILE
from ahcq_plugin.ptq.tune import Loss
from ahcq_plugin.support.arguments import check_device, check_writable
from ahcq_plugin.support.batches import Forward, run_first
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.files import fresh, replace_together, write_json
from ahcq_plugin.support.lock import locked
from ahcq_plugin.support.state import check_finite, copied
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.workers import Workers

#: Files written into the work dir.
OUTPUTS = ("metrics.json", "report.html", QUANTIZED_FILE, PACKED_FILE)
#: From more items of test data on, their evaluation takes longer than to try on one item whether units trace.
_FEW = 16
#: In the order of the run.
STAGES = (
    "detect",
    "fp_eval",
    "prepare",
    "targets",
    "precondition",
    "calibrate",
    "reconstruct",
    "freeze",
    "tune_features",
    "tune",
    "audit",
    "quantized_eval",
)


class Measured(Protocol):
    """Figures of a model and what else is kept of an evaluation; JSON keeps it for other runs."""

    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]: ...

    @staticmethod
    def from_json(content: dict[str, Any]) -> Measured: ...


@dataclass(frozen=True)
class PTQResult:
    """Outcome of a run: ``metrics`` as in ``metrics.json``, the engine's report, the files written."""

    metrics: dict[str, Any]
    report: QuantReport
    files: dict[str, Path]


class QuantizationLoop(BaseLoop):
    """Floating-point evaluation, quantization, audit, quantized evaluation, report.

    Runs in ``run()``, after the Runner has loaded its checkpoint; what :meth:`wrap` returns then replaces
    ``runner.model``. Writes ``metrics.json``, ``report.html``, ``quantized.pth`` and ``quantized.safetensors`` into the
    Runner's work dir.

    The config says at its top level what is quantized and how: ``sam = dict(name=..., checkpoint=...)`` and ``recipe``,
    a name or a dict, see :class:`ahcq_plugin.ptq.Recipe`.

    Args:
        runner, dataloader: given by the Runner.
        units, leave: see :func:`ahcq_plugin.quantize`.
        toolkit: who places the quantizers: 'native' (this package) or 'mqbench'; the results are equal.
        cache_dir: folder where the floating-point evaluation (and detections) are kept for other runs; None: not kept.
        device: where to compute; default: where the Runner put the model.
        resume: go on with an interrupted reconstruction in the work dir.
    """

    #: Builds the SAM from name and ``checkpoint``, runs it on a calibration item; what tuning minimises (None: the
    #: engine's default); how evaluations come back from JSON.
    build: ClassVar[Callable[..., nn.Module]]
    forward: ClassVar[Forward]
    loss: ClassVar[Loss | None] = None
    measured: ClassVar[type[Measured]]

    def __init__(
        self,
        runner,
        dataloader,
        units: Any,
        leave: Sequence[str],
        toolkit: str,
        cache_dir: str | None,
        device: str | None,
        resume: bool,
    ):
        super().__init__(runner, dataloader)
        self.sam_config, recipe = (self._top_level(key) for key in ("sam", "recipe"))
        self.recipe = Recipe.from_config(recipe)
        self.units, self.leave, self.prepare_unit = units, list(leave), unit_preparer(toolkit)
        self.workers = Workers.running()
        self.cache = Cache(cache_dir, self.workers)
        self.device, self.resume = device, resume
        self.computing = False
        self.result: PTQResult | None = None

    @classmethod
    def check(cls, cfg: Config, random_weights: bool = False) -> None:
        """Check what a config says of a run, before anything is built; with ``random_weights`` the detector needs no
        checkpoint.

        Raises:
            ValueError, FileNotFoundError: one line that says what is wrong and what to do.
        """
        loop = cfg.test_cfg
        cls.check_settings(cfg)
        cls.check_data(cfg, random_weights)
        sam = build_sam_from_config(cfg.sam, cls.build)
        check_finite(sam, "the SAM")
        widths = [layer.in_features for layer in sam.modules() if isinstance(layer, nn.Linear)]
        recipe = Recipe.from_config(cfg.recipe)
        recipe.check_channels(max(widths, default=0), "the widest layer of the SAM")
        recipe.check_globs([name for name, _ in sam.named_modules() if name], "modules of the SAM")
        try:
            if loop.get("units") is not None and not find_units(sam, loop.units):
                raise ValueError("test_cfg: `units` is empty: name blocks, or leave it out")
        except TypeError as error:
            raise ValueError(f"test_cfg: {error}") from error

    @classmethod
    def check_settings(cls, cfg: Config) -> None:
        """The part of :meth:`check` that reads no file: recipe and options, also of what a dry run replaces.

        Raises:
            ValueError: one line that names the key.
        """
        Recipe.from_config(cfg.recipe).check_machine()
        unit_preparer(cfg.test_cfg.get("toolkit", "native"))
        check_device(cfg.test_cfg.get("device"))
        if not isinstance(cfg.test_cfg.get("cache_dir", ""), str | None):
            raise ValueError(f"test_cfg: `cache_dir` must be a folder or None, got {cfg.test_cfg.cache_dir!r:.80}")
        if cfg.test_cfg.get("cache_dir") is not None and Path(check_writable(cfg.test_cfg.cache_dir)).is_file():
            raise ValueError(f"test_cfg: `cache_dir` is a file, {cfg.test_cfg.cache_dir}; give a folder")
        cls.check_options(cfg.test_cfg)

    @classmethod
    @abstractmethod
    def check_options(cls, loop: Mapping[str, Any]) -> None:
        """The loop's own options in ``test_cfg``; ValueError for a wrong one."""

    @classmethod
    @abstractmethod
    def check_data(cls, cfg: Config, random_weights: bool) -> None:
        """The part of :meth:`check` that concerns test data, calibration data and where boxes come from."""

    @classmethod
    @abstractmethod
    def cut_down(cls, cfg: Config) -> list[str]:
        """Cut data and SAM of ``cfg`` down to a dry run, in place; what is generated goes into ``cfg.work_dir``.

        Returns: what was replaced, one line each.
        """

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that is measured, from the Runner's: it has ``sam``, which is quantized, and ``device``."""

    @abstractmethod
    def read(self, model: nn.Module) -> Sequence[Any]:
        """Records of the test data."""

    @abstractmethod
    def calibration(self, model: nn.Module, tune: bool) -> tuple[Sequence[Any], Sequence[Any] | None]:
        """Calibration items, for ``forward``, and, with ``tune``, those to learn from in the end; None: the same."""

    @abstractmethod
    def evaluate(self, model: nn.Module, records: Sequence[Any], reference: Measured | None, desc: str) -> Measured:
        """Measure; with ``reference`` also the distance to its masks."""

    @abstractmethod
    def identity(self, model: nn.Module, records: Sequence[Any]) -> list[Any]:
        """What a floating-point evaluation depends on, beside the SAM's weights and modules."""

    @abstractmethod
    def pictures(self, records: Sequence[Any], floating: Measured, quantized: Measured) -> dict[str, list[Any]]:
        """Fields of ReportData that show masks."""

    @abstractmethod
    def notes(self, items: Sequence[Any]) -> dict[str, Any]:
        """What the checkpoint says of the calibration items."""

    def details(self, floating: Measured, quantized: Measured) -> dict[str, Any]:
        """More for ``metrics.json``."""
        return {}

    def run(self) -> dict[str, float]:
        """Run all stages; no other run may write to the work dir meanwhile.

        Returns: metrics as ``fp/AP``, ``quantized/AP``, ...; the whole outcome stays in ``self.result``.
        Raises:
            LockedError: another one does.
            ValueError, FileNotFoundError: bad weights or data. Once ``self.computing`` is True a ValueError means bad
                input only if it is a DataError, a ResumeError, or raised by this package in its own words.
            UnitError: the SAM cannot be quantized as it is.
            AuditError: the audit failed; nothing is reported then.
        """
        with locked(self.runner.work_dir) if self.workers.is_first else nullcontext():
            return self._run()

    def _run(self) -> dict[str, float]:
        runner, stages, workers = self.runner, Stopwatch(), self.workers
        for name in OUTPUTS if workers.is_first else ():  # what a killed run had made of its results
            fresh(Path(runner.work_dir, name)).unlink(missing_ok=True)
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        model = self.wrap(runner.model).to(self.device or get_device()).eval()
        runner.model = model
        with stages("detect", model.device):
            batches, tune_batches = self.calibration(model, self.recipe.tunes)  # may be too few
            records = self.read(model)
        notes, self.computing = self.notes(batches), True
        if len(records) > _FEW:
            self._try_units(model, batches)
        with stages("fp_eval", model.device):
            floating = self._floating_point(model, records)
        model.sam, report = quantize(
            model.sam,
            batches,
            self.recipe,
            units=self.units,
            forward=type(self).forward,
            work_dir=runner.work_dir,
            resume=self.resume,
            inplace=True,
            prepare_unit=self.prepare_unit,
            workers=workers,
            notes=notes,
            leave=self.leave,
            checkpoint=fresh(QUANTIZED_FILE).name,
            loss=type(self).loss,
            tune_batches=tune_batches,
        )
        stages.records.update(report.stages)
        with stages("quantized_eval", model.device):
            quantized = self.evaluate(model, records, floating, desc="quantized evaluation")
        self.result = self._report(records, floating, quantized, report, stages.records, batches[0], notes)
        flat = {
            f"{part}/{name}": value for part in ("fp", "quantized") for name, value in self.result.metrics[part].items()
        }
        runner.call_hook("after_test_epoch", metrics=flat)
        runner.call_hook("after_test")
        return flat

    def _try_units(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Prepare a copy of the SAM, which says what cannot be quantized."""

        def run(sam: nn.Module) -> Any:
            return run_first(sam, batches, type(self).forward)

        prepare(copied(model.sam), self.recipe, self.units, self.prepare_unit, self.leave, run)

    def _floating_point(self, model: nn.Module, records: Sequence[Any]) -> Measured:
        def key() -> str:
            return digest([digest(model.sam.state_dict()), repr(model.sam), *self.identity(model, records)])

        def compute() -> dict[str, Any]:
            return self.evaluate(model, records, None, desc="floating-point evaluation").to_json()

        return self.measured.from_json(self.cache.fetch(f"floating_point_{self.measured.__name__}", key, compute))

    def _report(
        self, records, floating: Measured, quantized: Measured, report: QuantReport, stages, item, notes
    ) -> PTQResult:
        folder = Path(self.runner.work_dir)
        files = {name: folder / name for name in OUTPUTS}
        content = report.to_dict()
        metrics = {
            "fp": floating.metrics,
            "quantized": quantized.metrics,
            **self.details(floating, quantized),
            "audit": {"passed": report.audit.passed, "counts": report.audit.counts},
            "coverage": report.coverage.to_dict(),
            "recipe": self.recipe.name,
            "bits": [self.recipe.w_bits, self.recipe.a_bits],
            "stages": {name: stages[name] for name in STAGES if name in stages},
        }
        if not self.workers.is_first:
            return PTQResult(metrics, report, files)
        save_quantized(self.runner.model.sam, fresh(files[PACKED_FILE]), report=report, notes=notes)
        metrics["files"] = {name: fresh(files[name]).stat().st_size for name in (QUANTIZED_FILE, PACKED_FILE)}
        write_json(metrics, fresh(files["metrics.json"]))
        data = ReportData(
            metrics,
            content["units"],
            content["roles"],
            content["audit"],
            self.runner.cfg.pretty_text,
            content["conditions"],
            distributions=collect_distributions(self.runner.model.sam, item, type(self).forward, report.unrounded),
            **self.pictures(records, floating, quantized),
        )
        write_report(fresh(files["report.html"]), data)
        replace_together(files.values())  # an earlier run's stay until all of this one's are there
        return PTQResult(metrics, report, files)

    def _top_level(self, key: str) -> Any:
        if key not in self.runner.cfg:
            raise ValueError(f"{type(self).__name__}: give `{key}` at the top level of the config")
        return self.runner.cfg[key]
