# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization on images: a plain MMDetection config and ``test_cfg`` make a PTQ run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from ahcq_plugin.mm.checks import check_dataset, check_detections, check_detector, check_known, check_pipeline
from ahcq_plugin.mm.data.wrappers import innermost
from ahcq_plugin.mm.evaluation.everything import EverythingOptions, segment_everything
from ahcq_plugin.mm.evaluation.image_evaluation import Evaluation, box_ap, evaluate
from ahcq_plugin.mm.evaluation.prompted import check_kinds
from ahcq_plugin.mm.evaluation.records import (
    CalibrationBatches,
    ImageRecord,
    calibration_dataset,
    calibration_records,
    read_records,
)
from ahcq_plugin.mm.options import BoxOptions, CalibrationOptions
from ahcq_plugin.mm.quantization_loop import QuantizationLoop
from ahcq_plugin.mm.report.data import sample_images
from ahcq_plugin.zoo.prompts import assign_kinds, check_shares, prompt_forward
from ahcq_plugin.zoo.sam import build_sam


@dataclass(frozen=True)
class Calibration(CalibrationOptions):
    """Which images and boxes calibrate.

    Args:
        dataset: config of a data set; default: the config's training data set, under the pipeline of the test data set.
        num_images, max_boxes: images, and boxes sampled per image.
        tune_images: images that a recipe with ``tune_steps`` learns from in the end; default: ``num_images``.
        tune_dataset: config of the data set that these are of; default: the one that calibrates, images and all.
        seed: of the choice of images, boxes and other prompts.
        prompts: where boxes come from, as for the run; default: the run's, and ground truth when those come from a file
            (of the test images). Or a dict that mixes kinds of prompts, one kind an image: shares of the images by kind
            (see :data:`ahcq_plugin.zoo.prompts.KINDS`), which add up to 1, and beside them ``source``, where boxes come
            from. Clicks lie on the annotated masks with ground-truth boxes that have them, else anywhere in the boxes.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("num_images", "max_boxes", "tune_images")

    num_images: int = 32
    max_boxes: int = 16
    tune_images: int | None = None
    tune_dataset: Mapping[str, Any] | None = None
    prompts: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tune_dataset, (Mapping, type(None))):
            raise ValueError(f"calib: `tune_dataset` must be the config of a data set, got {self.tune_dataset!r:.80}")
        if not isinstance(self.prompts, (str, Mapping, type(None))):
            raise ValueError(f"calib: `prompts` must be a name, a path or a dict of shares, got {self.prompts!r}")
        if not isinstance(self.source, (str, type(None))):
            raise ValueError(f"calib: `prompts.source` must be 'detector', 'gt' or a path, got {self.source!r}")
        for count in (self.num_images, self.tune_images):
            if count is not None:
                self.kinds(count)

    @property
    def source(self) -> str | None:
        """Where boxes come from; None: not said."""
        return self.prompts.get("source") if isinstance(self.prompts, Mapping) else self.prompts

    @property
    def shares(self) -> dict[str, Any] | None:
        """Kind of prompt -> share of the images; None: boxes only."""
        if not isinstance(self.prompts, Mapping) or set(self.prompts) == {"source"}:
            return None
        return {kind: share for kind, share in self.prompts.items() if kind != "source"}

    def kinds(self, count: int) -> list[str] | None:
        """Of the prompts of ``count`` images; None: boxes. ValueError: a share gives none of them."""
        return None if self.shares is None else assign_kinds(self.shares, count, self.seed)


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
        eval_prompts: kinds of prompts whose masks are measured besides those of boxes: some of click1, click3, mask
            (see :func:`~ahcq_plugin.mm.evaluation.prompted.segment_prompted`).
        everything: keys of :class:`~ahcq_plugin.mm.evaluation.everything.EverythingOptions`; None: everything mode is
            not measured.
    """

    build = staticmethod(build_sam)
    forward = staticmethod(prompt_forward)
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
        eval_prompts: Sequence[str] = (),
        everything: Mapping[str, Any] | None = None,
        units: Any = None,
        leave: Sequence[str] = (),
        toolkit: str = "native",
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader, units, leave, toolkit, cache_dir, device, resume)
        self.calib = Calibration.from_config(calib)
        self.prompts, self.eval_prompts = prompts, check_kinds(eval_prompts)
        self.everything = None if everything is None else EverythingOptions.from_config(everything)
        self.box_options = asdict(BoxOptions(score_thr, max_boxes, box_chunk))

    @classmethod
    def check_options(cls, loop: Mapping[str, Any]) -> None:
        """Calibration, boxes, kinds of prompts, everything mode."""
        Calibration.from_config(loop.get("calib"))
        BoxOptions(**{field.name: loop[field.name] for field in fields(BoxOptions) if field.name in loop})
        check_kinds(loop.get("eval_prompts", ()))
        EverythingOptions.from_config(loop.get("everything"))
        if not isinstance(loop.get("prompts", "detector"), str):
            raise ValueError(f"test_cfg: `prompts` must be 'detector', 'gt' or a file, got {loop['prompts']!r}")

    @classmethod
    def check_data(cls, cfg: Config, random_weights: bool) -> None:
        """Data sets, and the detector's checkpoint or the file of detections."""
        loop, source = cfg.test_cfg, cfg.get("data_source")
        check_pipeline(cfg.test_dataloader.dataset)
        calib = Calibration.from_config(loop.get("calib"))
        check_dataset(cfg.test_dataloader.dataset, source, masks=True)
        for dataset in _calibration_data(cfg, calib).values():
            check_dataset(dataset, source)
        prompts = loop.get("prompts", "detector")
        for source in dict.fromkeys([prompts, calib.source or prompts]):
            if source == "detector":
                if cfg.model.type == "NoDetector":
                    raise ValueError(
                        "prompts='detector', but the config has NoDetector: use prompts='gt' or a detections JSON"
                    )
                if not random_weights:
                    check_detector(cfg)
            elif source != "gt":
                check_detections(source, cfg.test_dataloader.dataset)

    @classmethod
    def cut_down(cls, cfg: Config) -> list[str]:
        """Generated images, a small SAM, small inputs, boxes whatever their scores."""
        loop = cfg.test_cfg
        check_pipeline(cfg.test_dataloader.dataset)
        check_known(cfg.test_dataloader.dataset, "test_dataloader.dataset")
        for key, data in _calibration_data(cfg, Calibration.from_config(loop.get("calib"))).items():
            check_known(data, f"calib.{key}")
        name = cfg.sam["name"]
        sam = dry_run.small_sam(name)
        lost = dry_run.drop_lost(cfg, name, sam) if sam else []
        cfg.sam = dict(name=sam or name, checkpoint=False)
        calib = Calibration.from_config(loop.get("calib"))
        kinds = [] if calib.shares is None else list(check_shares(calib.shares))
        images = max(dry_run.IMAGES, len(kinds))
        dataset = dry_run.scenes(cfg.test_dataloader.dataset, Path(cfg.work_dir), images)
        notes = [
            f"{images} generated images of {dry_run.IMAGE_SIZE} pixels, "
            f"{dry_run.ITERATIONS} iterations a unit, random weights",
            f"SAM's input is {sam['image_size']} pixels, its encoder has {sam['depth']} blocks of width "
            f"{sam['embed_dim']} with {sam['num_heads']} heads"
            if sam
            else f"SAM is {name} as it is, which may take minutes an image on a CPU",
        ]
        if lost:
            notes.append(f"it lacks {', '.join(lost)}, which are left out")
        if dry_run.shrink_inputs(dataset["pipeline"]):
            notes.append(f"the detector's input is {dry_run.DETECTOR_INPUT_SIZE} pixels")
        cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
        cfg.test_dataloader["dataset"] = dataset  # update() would merge it with the old one
        if loop.get("prompts", "detector") != "detector":
            loop.prompts = "gt"  # a file of detections knows other images
        # A detector with random weights may find nothing, and calibration needs boxes.
        prompts = dict(source="gt", **{kind: 1 / len(kinds) for kind in kinds})
        loop["calib"] = dict(
            dataset=dataset, num_images=images, max_boxes=dry_run.BOXES, prompts=prompts, seed=calib.seed
        )
        loop.update(score_thr=0.0, max_boxes=dry_run.BOXES)
        if loop.get("everything") is not None:
            loop["everything"] = dict(num_images=1, points_per_side=2)
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

    def calibration(self, model: BoxPromptedSAM, tune: bool) -> tuple[CalibrationBatches, CalibrationBatches | None]:
        """Images with sampled boxes, or other prompts. Those to tune are of a data set of their own, or the
        calibration's and more, or fewer of them; a detector sees these once."""
        calib, cfg = self.calib, self.runner.cfg
        prompts = calib.source or ("gt" if model.detections is not None else model.prompts)
        if prompts != model.prompts:
            model = BoxPromptedSAM(model.sam, model.detector, prompts, cat_ids=self._cat_ids(), **self.box_options)
        pipeline = innermost(cfg.test_dataloader.dataset)["pipeline"]
        data = _calibration_data(cfg, calib)

        def read(which: str, count: int, key: str) -> list[ImageRecord]:
            dataset = calibration_dataset(data[which], pipeline)
            return self.workers.first(calibration_records(dataset, model, count, calib.seed, key))

        counts, own = {"num_images": calib.num_images}, tune and "tune_dataset" in data
        if tune and (own or calib.tune_images not in (None, calib.num_images)):
            counts["tune_images"] = calib.tune_images or calib.num_images
        if own:
            parts = [read(which, count, key) for which, (key, count) in zip(data, counts.items(), strict=True)]
        else:
            most = max(counts, key=counts.__getitem__)
            records = read("dataset", counts[most], most)
            parts = [records[:count] for count in counts.values()]
        batches = [
            CalibrationBatches(model, part, calib.max_boxes, calib.seed, calib.kinds(len(part)), self.workers)
            for part in parts
        ]
        return batches[0], batches[1] if len(batches) > 1 else None

    def evaluate(self, model, records, reference: Evaluation | None, desc: str) -> Evaluation:
        """Mask AP and IoU, also of other prompts; everything mode; in floating point also the AP of detected boxes."""
        classes, ann_file = self.dataloader.dataset.metainfo, self._ann_file()
        evaluation = evaluate(model, records, classes, ann_file, reference, desc, self.workers, self.eval_prompts)
        if self.everything is not None:
            before = None if reference is None else reference.everything
            found, figures = segment_everything(
                model.sam, records, self.everything, before, f"{desc}, everything mode", self.workers
            )
            evaluation = replace(evaluation, metrics=evaluation.metrics | figures, everything=found)
        if reference is None and model.prompts != "gt":
            boxes = box_ap(records, classes, ann_file)
            evaluation.metrics.update(AP_box=boxes["AP"], AP50_box=boxes["AP50"])
        return evaluation

    def identity(self, model: BoxPromptedSAM, records: Sequence[ImageRecord]) -> list[Any]:
        """Threshold, place, images and prompts."""
        where = [model.device.type, torch.__version__, model.box_chunk]
        where += [self.eval_prompts, None if self.everything is None else asdict(self.everything)]
        return [model.sam.mask_threshold, where, [record.identity() for record in records]]

    def pictures(self, records, floating: Evaluation, quantized: Evaluation) -> dict[str, list[Any]]:
        """Sample images."""
        return {"samples": sample_images(records, floating, quantized)}

    def notes(self, items: CalibrationBatches) -> dict[str, Any]:
        """Ids of the images, and the kinds of prompts where they are mixed."""
        kinds = {} if self.calib.shares is None else {"calibration_prompts": items.kinds}
        return {"calibration_images": items.image_ids, **kinds}

    def details(self, floating: Evaluation, quantized: Evaluation) -> dict[str, Any]:
        """What everything mode took and gave."""
        parts = {"fp": floating.everything, "quantized": quantized.everything}
        if self.everything is None:
            return {}
        return {
            "everything": {
                name: {"masks": part.count, "images": len(part.found), "seconds_per_image": part.seconds}
                for name, part in parts.items()
            }
        }

    def _cat_ids(self) -> list[int] | None:
        return getattr(innermost(self.dataloader.dataset), "cat_ids", None)

    def _ann_file(self) -> str | None:
        dataset = self.dataloader.dataset
        return dataset.ann_file if isinstance(dataset, CocoDataset) else None


def _calibration_data(cfg: Config, calib: Calibration) -> dict[str, Mapping[str, Any]]:
    """Configs of the data sets, by their keys in ``calib``: the one that calibrates, by default the training data set,
    and where it is given the one that tunes."""
    dataset = calib.dataset or (cfg.get("train_dataloader") or {}).get("dataset")
    if dataset is None:
        raise ValueError("no calibration images: give test_cfg.calib.dataset or train_dataloader in the config")
    return {"dataset": dataset} | ({"tune_dataset": calib.tune_dataset} if calib.tune_dataset else {})
