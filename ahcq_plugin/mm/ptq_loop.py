# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization on images: a plain MMDetection config and ``test_cfg`` make a PTQ run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from torch import nn

from ahcq_plugin.mm import dry_run
from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, build_sam_from_config
from ahcq_plugin.mm.checks import check_dataset, check_detector
from ahcq_plugin.mm.data.prompts import read_detections
from ahcq_plugin.mm.data.wrappers import innermost
from ahcq_plugin.mm.evaluation.image_evaluation import Evaluation, box_ap, evaluate
from ahcq_plugin.mm.evaluation.records import (
    CalibrationBatches,
    ImageRecord,
    calibration_dataset,
    calibration_records,
    read_records,
)
from ahcq_plugin.mm.quantization_loop import CalibrationOptions, QuantizationLoop
from ahcq_plugin.mm.report.data import sample_images
from ahcq_plugin.zoo.sam import box_forward, build_sam


@dataclass(frozen=True)
class Calibration(CalibrationOptions):
    """Which images and boxes calibrate.

    Args:
        dataset: config of a data set; default: the config's training data set, under the pipeline of the test data set.
        num_images, max_boxes: images, and boxes sampled per image.
        seed: of the choice of images and boxes.
        prompts: as of the run; default: the run's, and ground truth when those come from a file (of the test images).
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("num_images", "max_boxes")

    dataset: Mapping[str, Any] | None = None
    num_images: int = 32
    max_boxes: int = 16
    seed: int = 0
    prompts: str | None = None


@LOOPS.register_module()
class PTQLoop(QuantizationLoop):
    """A run on images, see :class:`QuantizationLoop`.

    Only in ``run()`` is the detector wrapped into BoxPromptedSAM, since wrapping changes its checkpoint's keys. The
    Runner's evaluator is not used: masks are measured against the data set's annotations here.

    Started by MMEngine's launchers, several processes share images, calibration and the items of a reconstruction step;
    figures and checkpoint are those of one process (see :class:`ahcq_plugin.support.workers.Workers`).

    Args:
        units, leave, toolkit, cache_dir, device, resume: see :class:`QuantizationLoop`.
        calib: keys of :class:`Calibration`.
        prompts, score_thr, max_boxes, box_chunk: see :class:`BoxPromptedSAM`.
    """

    build = staticmethod(build_sam)
    forward = staticmethod(box_forward)
    measured = Evaluation

    def __init__(
        self,
        runner,
        dataloader,
        evaluator=None,
        calib: Mapping[str, Any] | None = None,
        prompts: str = "detector",
        score_thr: float = 0.05,
        max_boxes: int = 100,
        box_chunk: int = 64,
        units: Any = None,
        leave: Sequence[str] = (),
        toolkit: str = "native",
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader, units, leave, toolkit, cache_dir, device, resume)
        self.calib = Calibration.from_config(calib)
        self.prompts = prompts
        self.box_options = dict(score_thr=score_thr, max_boxes=max_boxes, box_chunk=box_chunk)

    @classmethod
    def check_data(cls, cfg: Config, random_weights: bool) -> None:
        """Data sets, and the detector's checkpoint or the file of detections."""
        loop, source = cfg.test_cfg, cfg.get("data_source")
        calib = Calibration.from_config(loop.get("calib"))
        check_dataset(cfg.test_dataloader.dataset, source, masks=True)
        check_dataset(_calibration_data(cfg, calib), source)
        prompts = loop.get("prompts", "detector")
        if prompts == "detector":
            if cfg.model.type == "NoDetector":
                raise ValueError(
                    "prompts='detector', but the config has NoDetector: use prompts='gt' or a detections JSON"
                )
            if not random_weights:
                check_detector(cfg)
        elif prompts != "gt" and not read_detections(prompts):
            raise ValueError(f"{prompts} holds no detections")

    @classmethod
    def cut_down(cls, cfg: Config) -> list[str]:
        """Generated images, a small SAM, small inputs, boxes whatever their scores."""
        loop = cfg.test_cfg
        sam = dry_run.small_sam(cfg.sam["name"])
        cfg.sam = dict(name=sam, checkpoint=False)
        dataset = dry_run.scenes(cfg.test_dataloader.dataset, Path(cfg.work_dir))
        notes = [
            f"{dry_run.IMAGES} generated images of {dry_run.IMAGE_SIZE} pixels, "
            f"{dry_run.ITERATIONS} iterations a unit, random weights",
            f"SAM's input is {sam['image_size']} pixels, its encoder has {sam['depth']} blocks of width "
            f"{sam['embed_dim']} with {sam['num_heads']} heads",
        ]
        if dry_run.shrink_inputs(dataset["pipeline"]):
            notes.append(f"the detector's input is {dry_run.DETECTOR_INPUT_SIZE} pixels")
        cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
        cfg.test_dataloader["dataset"] = dataset  # update() would merge it with the old one
        if loop.get("prompts", "detector") != "detector":
            loop.prompts = "gt"  # a file of detections knows other images
        seed = (loop.get("calib") or {}).get("seed", 0)
        # A detector with random weights may find nothing, and calibration needs boxes.
        loop["calib"] = dict(
            dataset=dataset, num_images=dry_run.IMAGES, max_boxes=dry_run.BOXES, prompts="gt", seed=seed
        )
        loop.update(score_thr=0.0, max_boxes=dry_run.BOXES)
        dry_run.let_everything_pass(cfg.model)
        return notes

    def wrap(self, model: nn.Module) -> BoxPromptedSAM:
        """The detector and the SAM."""
        detector = model.module if is_model_wrapper(model) else model
        return BoxPromptedSAM(
            build_sam_from_config(self.sam_config, self.build),
            detector,
            self.prompts,
            cat_ids=self._cat_ids(),
            **self.box_options,
        )

    def read(self, model: BoxPromptedSAM) -> list[ImageRecord]:
        """Images with their prompts."""
        return read_records(self.dataloader, model, self.cache, self.workers)

    def calibration(self, model: BoxPromptedSAM) -> CalibrationBatches:
        """Images with sampled boxes."""
        calib, cfg = self.calib, self.runner.cfg
        prompts = calib.prompts or ("gt" if model.detections is not None else model.prompts)
        if prompts != model.prompts:
            model = BoxPromptedSAM(model.sam, model.detector, prompts, cat_ids=self._cat_ids(), **self.box_options)
        pipeline = innermost(cfg.test_dataloader.dataset)["pipeline"]
        dataset = calibration_dataset(_calibration_data(cfg, calib), pipeline)
        records = self.workers.first(calibration_records(dataset, model, calib.num_images, calib.seed))
        return CalibrationBatches(model, records, calib.max_boxes, calib.seed)

    def evaluate(self, model, records, reference: Evaluation | None, desc: str) -> Evaluation:
        """Mask AP and IoU; in floating point also the AP of detected boxes."""
        classes, ann_file = self.dataloader.dataset.metainfo, self._ann_file()
        evaluation = evaluate(model, records, classes, ann_file, reference, desc, self.workers)
        if reference is None and model.prompts != "gt":
            boxes = box_ap(records, classes, ann_file)
            evaluation.metrics.update(AP_box=boxes["AP"], AP50_box=boxes["AP50"])
        return evaluation

    def identity(self, model: BoxPromptedSAM, records: Sequence[ImageRecord]) -> list[Any]:
        """Threshold, place, images and prompts."""
        where = [model.device.type, torch.__version__, model.box_chunk]
        return [model.sam.mask_threshold, where, [record.identity() for record in records]]

    def pictures(self, records, floating: Evaluation, quantized: Evaluation) -> dict[str, list[Any]]:
        """Sample images."""
        return {"samples": sample_images(records, floating, quantized)}

    def notes(self, items: CalibrationBatches) -> dict[str, Any]:
        """Ids of the images."""
        return {"calibration_images": items.image_ids}

    def _cat_ids(self) -> list[int] | None:
        return getattr(innermost(self.dataloader.dataset), "cat_ids", None)

    def _ann_file(self) -> str | None:
        dataset = self.dataloader.dataset
        return dataset.ann_file if isinstance(dataset, CocoDataset) else None


def _calibration_data(cfg: Config, calib: Calibration) -> Mapping[str, Any]:
    """Config of the data set that calibrates: ``calib.dataset``, else the training data set."""
    dataset = calib.dataset or (cfg.get("train_dataloader") or {}).get("dataset")
    if dataset is None:
        raise ValueError("no calibration images: give test_cfg.calib.dataset or train_dataloader in the config")
    return dataset
