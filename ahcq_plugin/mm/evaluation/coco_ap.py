# SPDX-License-Identifier: Apache-2.0
"""COCO average precision without rounding, over the images that were evaluated."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.fileio import load

#: Our name -> index in ``COCOeval.stats``.
STATS = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5}


@METRICS.register_module()
class ExactCocoMetric(CocoMetric):
    """mmdet's CocoMetric, which rounds to three decimals, without the rounding (at 0.1 AP that is 0.5 %), and quiet.

    Differences: only images that were processed count, so a data set with ``indices`` is judged on its own images; no
    detections at all give 0; a figure that cannot be had (no object of that size) is left out instead of -1.
    Takes one ``metric``: ``'bbox'`` or ``'segm'``.
    """

    def __init__(self, ann_file: str | None = None, metric: str = "segm", **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(ann_file=ann_file, metric=metric, **kwargs)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """``{"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"}`` from what ``process`` collected."""
        (metric,) = self.metrics
        truths, predictions = zip(*results, strict=True)
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            if self._coco_api is None:
                self._coco_api = COCO(self.gt_to_coco_json(truths, str(Path(folder) / "truth")))
            self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
            evaluated = self._load(predictions, metric, folder)
            if evaluated is None:
                return {"AP": 0.0, "AP50": 0.0}
            evaluation = COCOeval(self._coco_api, evaluated, metric)
            evaluation.params.catIds = self.cat_ids
            evaluation.params.imgIds = [truth["img_id"] for truth in truths]
            evaluation.params.maxDets = list(self.proposal_nums)
            evaluation.params.iouThrs = self.iou_thrs
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures = {name: float(evaluation.stats[index]) for name, index in STATS.items()}
        return {name: value for name, value in figures.items() if value >= 0}

    def _load(self, predictions, metric: str, folder: str):
        files = self.results2json(predictions, str(Path(folder) / "results"))
        if not any(len(prediction["labels"]) for prediction in predictions):
            return None
        rows = load(files[metric])
        if metric == "segm":  # else pycocotools takes the area of the box for the size classes
            for row in rows:
                row.pop("bbox")
        return self._coco_api.loadRes(rows)
