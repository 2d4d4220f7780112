# SPDX-License-Identifier: Apache-2.0
"""One pass over the images: mask AP with the prompts of the run, mask IoU with ground-truth boxes and other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.structures import InstanceData
from tqdm import tqdm

from ahcq_plugin.metrics.bootstrap import bootstrap_mean
from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, ImageEmbedding
from ahcq_plugin.mm.data.prompts import BoxPrompts
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.coco_ap import ExactCocoMetric
from ahcq_plugin.mm.evaluation.everything import Everything
from ahcq_plugin.mm.evaluation.prompted import segment_prompted
from ahcq_plugin.mm.evaluation.records import ImageRecord
from ahcq_plugin.support.workers import ALONE, Workers

#: Sizes of objects, as COCO's evaluation has them: from so many pixels to below so many.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model and its masks.

    Args:
        metrics: ``AP``, ``AP50``, ... of the masks with the prompts of the run (detections, or ground-truth boxes);
            with detections also ``AP_gt``, ``AP50_gt`` with ground-truth boxes; ``mIoU``: mean IoU, over objects, of
            masks prompted with ground-truth boxes and ground truth; ``IoU_fp``: the same against the reference's
            masks, ``IoU_fp_low`` and ``IoU_fp_high`` its 95 % limits by bootstrap over images, ``IoU_fp_small``,
            ``_medium``, ``_large`` that of reference masks below 32 * 32 pixels of the image, below 96 * 96, and of
            larger ones (COCO's sizes), where there are some; ``mIoU_click1``,
            ``IoU_fp_click1``, ...: the same with other prompts.
        truth_masks: image id -> masks prompted with its ground-truth boxes, in their order.
        prompted: kind of prompt -> image id -> the same with that kind.
        everything: of everything mode, if asked for.
    """

    metrics: dict[str, float]
    truth_masks: dict[int | str, list[masks.RLE]]
    prompted: dict[str, dict[int | str, list[masks.RLE]]] = field(default_factory=dict)
    everything: Everything | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, where keys would become strings: masks as pairs."""
        return {
            "metrics": self.metrics,
            "truth_masks": list(self.truth_masks.items()),
            "prompted": {kind: list(rles.items()) for kind, rles in self.prompted.items()},
            "everything": None if self.everything is None else self.everything.to_json(),
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> Evaluation:
        """Inverse of :meth:`to_json`."""
        everything = content["everything"]
        return Evaluation(
            content["metrics"],
            dict(content["truth_masks"]),
            {kind: dict(rles) for kind, rles in content["prompted"].items()},
            None if everything is None else Everything.from_json(everything),
        )


def evaluate(
    model: BoxPromptedSAM,
    records: Sequence[ImageRecord],
    metainfo: dict,
    ann_file: str | None,
    reference: Evaluation | None = None,
    desc: str = "evaluate",
    workers: Workers = ALONE,
    kinds: Sequence[str] = (),
) -> Evaluation:
    """Segment all images with both sets of prompts; the image encoder runs once per image.

    Args:
        metainfo: of the data set; ``classes`` is used.
        ann_file: COCO annotations for AP; None: the records' own.
        reference: evaluation whose masks ``IoU_fp`` is measured against.
        desc: label of the progress bar.
        workers: processes that share the images; every one of them gets the whole evaluation.
        kinds: of prompts besides, see :func:`~ahcq_plugin.mm.evaluation.prompted.segment_prompted`.

    Raises:
        DataError: no image has a ground-truth object, or one cannot be read (see :class:`ImageRecord`).
    """
    detected = any(record.detected is not None for record in records)
    metrics = {"_gt" if detected else "": _coco_metric("segm", metainfo, ann_file)}
    if detected:
        metrics[""] = _coco_metric("segm", metainfo, ann_file)
    mine = []
    for index in tqdm(workers.share(len(records)), desc=desc, unit="image", disable=not workers.is_first):
        record = records[index]
        embedding = model.encode(record.read()) if len(record.truth) + len(record.prompts) else None
        rles = _add(metrics["_gt" if detected else ""], model, embedding, record, record.truth)
        if detected:
            _add(metrics[""], model, embedding, record, record.detected)
        prompted = segment_prompted(model, embedding, record, kinds) if len(record.truth) and kinds else {}
        mine.append((rles, prompted, {suffix: metric.results.pop() for suffix, metric in metrics.items()}))
    truth_ious, reference_ious, areas, kept = [], [], [], {}
    by_kind: dict[str, dict[int | str, list[masks.RLE]]] = {kind: {} for kind in kinds}
    for record, (rles, prompted, results) in zip(records, workers.in_order(mine, len(records)), strict=True):
        truth_ious += masks.pairwise_iou(rles, record.truth_masks())
        if reference is not None:
            wanted = reference.truth_masks[record.img_id]
            reference_ious.append(masks.pairwise_iou(rles, wanted))
            areas += masks.areas(wanted)
        kept[record.img_id] = rles
        for kind, others in prompted.items():
            by_kind[kind][record.img_id] = others
        for suffix, result in results.items():
            metrics[suffix].results.append(result)
    if not truth_ious:
        raise DataError(
            "no image of the data set has a ground-truth object: are the classes of the config (metainfo) the names of "
            "the categories in the annotation file?"
        )
    figures = {}
    for suffix in sorted(metrics):
        figures |= {f"{name}{suffix}": value for name, value in _result(metrics[suffix]).items()}
    figures["mIoU"] = sum(truth_ious) / len(truth_ious)
    if reference is not None:
        objects = [iou for image in reference_ious for iou in image]
        figures["IoU_fp"] = sum(objects) / len(objects)
        interval = bootstrap_mean(reference_ious)
        figures |= {"IoU_fp_low": interval.low, "IoU_fp_high": interval.high}
        for size, (least, limit) in SIZES.items():
            chosen = [iou for iou, area in zip(objects, areas, strict=True) if least <= area < limit]
            if chosen:
                figures[f"IoU_fp_{size}"] = sum(chosen) / len(chosen)
    truth = {record.img_id: record.truth_masks() for record in records} if kinds else {}
    for kind, found in by_kind.items():
        figures[f"mIoU_{kind}"] = _mean_iou(found, truth)
        if reference is not None:
            figures[f"IoU_fp_{kind}"] = _mean_iou(found, reference.prompted[kind])
    return Evaluation(figures, kept, by_kind)


def _mean_iou(found: dict[int | str, list[masks.RLE]], wanted: dict[int | str, list[masks.RLE]]) -> float:
    """Over the objects of all images of ``found``."""
    ious = [iou for img_id, rles in found.items() for iou in masks.pairwise_iou(rles, wanted[img_id])]
    return sum(ious) / len(ious)


def box_ap(records: Sequence[ImageRecord], metainfo: dict, ann_file: str | None) -> dict[str, float]:
    """COCO box AP of the detections: ``AP``, ``AP50``, ..."""
    metric = _coco_metric("bbox", metainfo, ann_file)
    for record in records:
        _process(metric, record, record.detected)
    return _result(metric)


def _coco_metric(kind: str, metainfo: dict, ann_file: str | None) -> ExactCocoMetric:
    metric = ExactCocoMetric(ann_file=ann_file, metric=kind)
    metric.dataset_meta = metainfo
    return metric


def _result(metric: ExactCocoMetric) -> dict[str, float]:
    return metric.compute_metrics(metric.results)


def _add(
    metric: ExactCocoMetric,
    model: BoxPromptedSAM,
    embedding: ImageEmbedding | None,
    record: ImageRecord,
    prompts: BoxPrompts,
) -> list[masks.RLE]:
    rles, scores = [], prompts.scores.clone()
    if len(prompts):
        for part, iou in model.decode(embedding, prompts.boxes):
            scores[len(rles) : len(rles) + len(part)] *= iou.cpu()
            rles += masks.encode(part)
    _process(metric, record, prompts, masks=rles, mask_scores=scores)
    return rles


def _process(metric: ExactCocoMetric, record: ImageRecord, prompts: BoxPrompts, **extra) -> None:
    predicted = InstanceData(bboxes=prompts.boxes, labels=prompts.labels, scores=prompts.scores, **extra)
    sample = {"img_id": record.img_id, "ori_shape": record.size, "instances": record.instances}
    metric.process({}, [sample | {"pred_instances": predicted}])
