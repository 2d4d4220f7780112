# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization on images: a plain MMDetection config and ``test_cfg`` make a PTQ run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmdet.datasets import CocoDataset
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from torch import nn

from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, build_sam_from_config
from ahcq_plugin.mm.evaluation.image_evaluation import Evaluation, box_ap, evaluate
from ahcq_plugin.mm.evaluation.records import (
    CalibrationBatches,
    ImageRecord,
    calibration_dataset,
    calibration_records,
    leaf_config,
    read_records,
    unwrapped,
)
from ahcq_plugin.mm.quantization_loop import CalibrationOptions, QuantizationLoop
from ahcq_plugin.mm.report.data import sample_images
from ahcq_plugin.zoo.sam import box_forward


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
        sam, recipe, units, toolkit, cache_dir, device, resume: see :class:`QuantizationLoop`.
        calib: keys of :class:`Calibration`.
        prompts, score_thr, max_boxes, box_chunk: see :class:`BoxPromptedSAM`.
    """

    forward = staticmethod(box_forward)
    measured = Evaluation

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
        toolkit: str = "native",
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader, sam, recipe, units, toolkit, cache_dir, device, resume)
        self.calib = Calibration.from_config(calib)
        self.prompts = prompts
        self.box_options = dict(score_thr=score_thr, max_boxes=max_boxes, box_chunk=box_chunk)

    def wrap(self, model: nn.Module) -> BoxPromptedSAM:
        """The detector and the SAM."""
        detector = model.module if is_model_wrapper(model) else model
        return BoxPromptedSAM(
            build_sam_from_config(self.sam_config), detector, self.prompts, cat_ids=self._cat_ids(), **self.box_options
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
        config = calib.dataset or cfg.get("train_dataloader", {}).get("dataset")
        if config is None:
            raise ValueError("PTQLoop: no calibration images; give `calib.dataset` or `train_dataloader` in the config")
        dataset = calibration_dataset(config, leaf_config(cfg.test_dataloader.dataset)["pipeline"])
        records = self.workers.first(calibration_records(dataset, model, calib.num_images, calib.seed))
        return CalibrationBatches(model, records, calib.max_boxes, calib.seed)

    def evaluate(self, model, records, reference: Evaluation | None, desc: str) -> Evaluation:
        """Mask AP and IoU; in floating point also the AP of detected boxes."""
        classes, ann_file = self.dataloader.dataset.metainfo, self._ann_file()
        found = evaluate(model, records, classes, ann_file, reference, desc, self.workers)
        if reference is None and model.prompts != "gt":
            boxes = box_ap(records, classes, ann_file)
            found.metrics.update(AP_box=boxes["AP"], AP50_box=boxes["AP50"])
        return found

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
        return getattr(unwrapped(self.dataloader.dataset), "cat_ids", None)

    def _ann_file(self) -> str | None:
        dataset = self.dataloader.dataset
        return dataset.ann_file if isinstance(dataset, CocoDataset) else None
