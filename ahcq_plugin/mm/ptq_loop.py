# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization as a test loop: a plain MMDetection config and ``test_cfg`` make a PTQ run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop
from torch import nn

from ahcq_plugin import QuantReport, quantize
from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, build_sam_from_config
from ahcq_plugin.mm.cache import Cache, digest
from ahcq_plugin.mm.evaluation import Evaluation, box_ap, evaluate
from ahcq_plugin.mm.files import write_json
from ahcq_plugin.mm.records import (
    CalibrationBatches,
    ImageRecord,
    calibration_dataset,
    calibration_records,
    leaf_config,
    read_records,
    unwrapped,
)
from ahcq_plugin.mm.report import write_report
from ahcq_plugin.mm.report_data import ReportData, sample_images
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.ptq.checkpoint import CALIBRATED_FILE, load_file
from ahcq_plugin.ptq.distributions import collect_distributions
from ahcq_plugin.ptq.stages import Stages
from ahcq_plugin.zoo.sam import box_forward

#: Files written into the work dir.
OUTPUTS = ("metrics.json", "report.html", "quantized.pth")
#: In the order of the run.
STAGES = (
    "detect",
    "fp_eval",
    "prepare",
    "precondition",
    "calibrate",
    "reconstruct",
    "freeze",
    "audit",
    "quantized_eval",
)


@dataclass(frozen=True)
class Calibration:
    """Which images and boxes calibrate.

    Args:
        dataset: config of a data set; default: the config's training data set, under the pipeline of the test data set.
        num_images, max_boxes: images, and boxes sampled per image.
        seed: of the choice of images and boxes.
        prompts: as of the run; default: the run's, and ground truth when those come from a file (of the test images).
    """

    dataset: Mapping[str, Any] | None = None
    num_images: int = 32
    max_boxes: int = 16
    seed: int = 0
    prompts: str | None = None

    def __post_init__(self) -> None:
        for key in ("num_images", "max_boxes"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"calib: `{key}` must be a positive integer, got {value!r}")

    @staticmethod
    def from_config(config: Mapping[str, Any] | None) -> Calibration:
        """From ``test_cfg.calib``. Raises ValueError on an unknown key or a bad value."""
        config = dict(config or {})
        allowed = Calibration.__dataclass_fields__
        unknown = sorted(set(config) - set(allowed))
        if unknown:
            raise ValueError(f"calib: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")
        return Calibration(**config)


@dataclass(frozen=True)
class PTQResult:
    """Outcome of a run: ``metrics`` as in ``metrics.json``, the engine's report, the files written."""

    metrics: dict[str, Any]
    report: QuantReport
    files: dict[str, Path]


@LOOPS.register_module()
class PTQLoop(BaseLoop):
    """Floating-point evaluation, quantization, audit, quantized evaluation, report.

    Runs in ``run()``, after the Runner has loaded the detector's checkpoint: only then is the model wrapped into
    BoxPromptedSAM, since wrapping changes the checkpoint's keys. Writes ``metrics.json``, ``report.html`` and
    ``quantized.pth`` into the Runner's work dir.

    Args:
        runner, dataloader, evaluator: given by the Runner. The evaluator is not used: the loop measures masks against
            the data set's annotations itself.
        sam: ``dict(name=..., checkpoint=...)``; default: ``sam`` at the config's top level.
        recipe: name or dict, see :class:`ahcq_plugin.ptq.Recipe`; default: ``recipe`` at the config's top level.
        calib: keys of :class:`Calibration`.
        prompts, score_thr, max_boxes, box_chunk: see :class:`BoxPromptedSAM`.
        units: see :func:`ahcq_plugin.quantize`.
        cache_dir: folder where detections and the floating-point evaluation are kept for other runs; None: not kept.
        device: where to compute; default: where the Runner put the model.
        resume: go on with an interrupted reconstruction in the work dir.
    """

    def __init__(
        self,
        runner,
        dataloader,
        evaluator=None,
        sam: Mapping[str, Any] | None = None,
        recipe: str | Mapping[str, Any] | None = None,
        calib: Mapping[str, Any] | None = None,
        prompts: str = "detector",
        score_thr: float = 0.05,
        max_boxes: int = 100,
        box_chunk: int = 64,
        units: Any = None,
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader)
        self.sam_config = sam if sam is not None else _top_level(runner.cfg, "sam")
        self.recipe = Recipe.from_config(recipe if recipe is not None else _top_level(runner.cfg, "recipe"))
        self.calib = Calibration.from_config(calib)
        self.prompts, self.units = prompts, units
        self.box_options = dict(score_thr=score_thr, max_boxes=max_boxes, box_chunk=box_chunk)
        self.cache = Cache(cache_dir)
        self.device, self.resume = device, resume
        self.result: PTQResult | None = None

    def run(self) -> dict[str, float]:
        """Run all stages.

        Returns: metrics as ``fp/AP``, ``quantized/AP``, ...; the whole outcome stays in ``self.result``.
        Raises:
            ValueError, FileNotFoundError: bad weights or data, before anything is quantized.
            RuntimeError: more than one process, or the audit failed; nothing is reported then.
        """
        if get_world_size() > 1:
            raise RuntimeError(f"PTQLoop runs in one process, got {get_world_size()}")
        runner, stages = self.runner, Stages()
        for name in OUTPUTS:  # an earlier run's must not pass for this one's if it fails
            Path(runner.work_dir, name).unlink(missing_ok=True)
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        model = self._wrap(runner.model)
        runner.model = model
        with stages("detect", model.device):
            records = read_records(self.dataloader, model, self.cache)
            batches = self._calibration_batches(model)
        with stages("fp_eval", model.device):
            floating = self._floating_point(model, records)
        model.sam, report = quantize(
            model.sam,
            batches,
            self.recipe,
            units=self.units,
            forward=box_forward,
            work_dir=runner.work_dir,
            resume=self.resume,
            inplace=True,
        )
        stages.records.update(report.stages)
        with stages("quantized_eval", model.device):
            quantized = self._evaluate(model, records, floating, desc="quantized evaluation")
        self.result = self._report(records, floating, quantized, report, stages.records, batches[0])
        flat = {
            f"{part}/{name}": value for part in ("fp", "quantized") for name, value in self.result.metrics[part].items()
        }
        runner.call_hook("after_test_epoch", metrics=flat)
        runner.call_hook("after_test")
        return flat

    def _wrap(self, detector: nn.Module) -> BoxPromptedSAM:
        if is_model_wrapper(detector):
            detector = detector.module
        wrapped = BoxPromptedSAM(
            build_sam_from_config(self.sam_config), detector, self.prompts, cat_ids=self._cat_ids(), **self.box_options
        )
        return wrapped.to(self.device or get_device()).eval()

    def _cat_ids(self) -> list[int] | None:
        return getattr(unwrapped(self.dataloader.dataset), "cat_ids", None)

    def _ann_file(self) -> str | None:
        dataset = self.dataloader.dataset
        return dataset.ann_file if isinstance(dataset, CocoDataset) else None

    def _calibration_batches(self, model: BoxPromptedSAM) -> CalibrationBatches:
        calib, cfg = self.calib, self.runner.cfg
        prompts = calib.prompts or ("gt" if model.detections is not None else model.prompts)
        if prompts != model.prompts:
            model = BoxPromptedSAM(model.sam, model.detector, prompts, cat_ids=self._cat_ids(), **self.box_options)
        config = calib.dataset or cfg.get("train_dataloader", {}).get("dataset")
        if config is None:
            raise ValueError("PTQLoop: no calibration images; give `calib.dataset` or `train_dataloader` in the config")
        dataset = calibration_dataset(config, leaf_config(cfg.test_dataloader.dataset)["pipeline"])
        records = calibration_records(dataset, model, calib.num_images, calib.seed)
        return CalibrationBatches(model, records, calib.max_boxes, calib.seed)

    def _evaluate(self, model, records, reference: Evaluation | None, desc: str) -> Evaluation:
        return evaluate(model, records, self.dataloader.dataset.metainfo, self._ann_file(), reference, desc)

    def _floating_point(self, model: BoxPromptedSAM, records: list[ImageRecord]) -> Evaluation:
        def key() -> str:
            weights = [digest(model.sam.state_dict()), repr(model.sam), model.sam.mask_threshold]
            where = [model.device.type, torch.__version__, model.box_chunk]
            return digest([weights, where, [record.identity() for record in records]])

        def compute() -> dict[str, Any]:
            evaluation = self._evaluate(model, records, None, desc="floating-point evaluation").to_json()
            if model.prompts != "gt":
                boxes = box_ap(records, self.dataloader.dataset.metainfo, self._ann_file())
                evaluation["metrics"] |= {"AP_box": boxes["AP"], "AP50_box": boxes["AP50"]}
            return evaluation

        return Evaluation.from_json(self.cache.fetch("floating_point", key, compute))

    def _report(
        self, records, floating: Evaluation, quantized: Evaluation, report: QuantReport, stages, batch
    ) -> PTQResult:
        folder = Path(self.runner.work_dir)
        files = {name: folder / name for name in OUTPUTS}
        content = report.to_dict()
        metrics = {
            "fp": floating.metrics,
            "quantized": quantized.metrics,
            "audit": {"passed": report.audit.passed, "counts": report.audit.counts},
            "recipe": self.recipe.name,
            "bits": [self.recipe.w_bits, self.recipe.a_bits],
            "stages": {name: stages[name] for name in STAGES if name in stages},
        }
        write_json(metrics, files["metrics.json"])
        unrounded = load_file(folder / CALIBRATED_FILE)["state"]  # what `quantize` started the reconstruction from
        data = ReportData(
            metrics,
            content["units"],
            content["roles"],
            content["audit"],
            self.runner.cfg.pretty_text,
            content["conditions"],
            sample_images(records, floating, quantized),
            collect_distributions(self.runner.model.sam, batch, box_forward, unrounded),
        )
        write_report(files["report.html"], data)
        return PTQResult(metrics, report, files)


def _top_level(cfg, key: str) -> Any:
    if key not in cfg:
        raise ValueError(f"PTQLoop: give `{key}` in test_cfg or at the top level of the config")
    return cfg[key]
