# SPDX-License-Identifier: Apache-2.0
"""Box prompts of an image: from a detector, from ground truth, or from a file of detections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.zoo.coco import read_detections


@dataclass(frozen=True)
class BoxPrompts:
    """Boxes of one image, on the CPU.

    Args:
        boxes: float32 (N, 4) xyxy in original pixels.
        labels: int64 (N,), index into the data set's classes.
        scores: float32 (N,), 1 for ground truth.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def of(boxes, labels, scores=None) -> BoxPrompts:
        """From anything array-like; ``scores`` default to 1."""
        boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
        labels = torch.as_tensor(np.asarray(labels, dtype=np.int64).reshape(-1))
        scores = np.ones(len(labels)) if scores is None else scores
        return BoxPrompts(boxes, labels, torch.as_tensor(np.asarray(scores, dtype=np.float32).reshape(-1)))

    @staticmethod
    def from_instances(instances) -> BoxPrompts:
        """From the ``pred_instances`` of an mmdet detector."""
        boxes = instances.bboxes
        boxes = boxes.tensor if hasattr(boxes, "tensor") else boxes
        return BoxPrompts.of(*(t.detach().float().cpu() for t in (boxes, instances.labels, instances.scores)))

    def to_lists(self) -> tuple[list, list, list]:
        """Plain (boxes, labels, scores), for JSON; ``BoxPrompts.of(*lists)`` gives the same tensors again."""
        return self.boxes.tolist(), self.labels.tolist(), self.scores.tolist()

    def top(self, score_thr: float, max_boxes: int) -> BoxPrompts:
        """Those with ``scores >= score_thr``, at most ``max_boxes``, highest scores first."""
        order = self.scores.argsort(descending=True, stable=True)
        order = order[self.scores[order] >= score_thr][:max_boxes]
        return BoxPrompts(self.boxes[order], self.labels[order], self.scores[order])


def prompts_from_annotations(instances: Sequence[dict]) -> BoxPrompts:
    """Ground-truth boxes of an image from mmdet's ``instances`` (as parsed, original pixels); crowds are left out."""
    kept = [i for i in instances if not i.get("ignore_flag", 0)]
    return BoxPrompts.of([i["bbox"] for i in kept], [i["bbox_label"] for i in kept])


def ground_truth_prompts(data_sample) -> BoxPrompts:
    """Ground-truth boxes of a data sample in original pixels.

    Taken from the ``instances`` that the sample carries (add it to the ``meta_keys`` of PackDetInputs), else from
    ``gt_instances``, which are in original pixels when the pipeline loads annotations after resizing, as mmdet's test
    pipelines do.

    Raises:
        DataError: the sample has neither.
    """
    if "instances" in data_sample:
        return prompts_from_annotations(data_sample.instances)
    if "gt_instances" not in data_sample or "bboxes" not in data_sample.gt_instances:
        raise DataError(
            "the data sample has no ground-truth boxes: add LoadAnnotations(with_bbox=True) to the pipeline"
        )
    instances = data_sample.gt_instances
    boxes = instances.bboxes
    boxes = boxes.tensor if hasattr(boxes, "tensor") else boxes
    return BoxPrompts.of(boxes.detach().cpu(), instances.labels.detach().cpu())


class Detections:
    """Detections of many images from a file in COCO results format, by image id; images without any give no boxes.

    Args:
        path: JSON list of ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``.
        cat_ids: category id of each label; detections of other categories are left out.

    Raises:
        FileNotFoundError, ValueError: no such file; not in that format.
    """

    def __init__(self, path: str | Path, cat_ids: Sequence[int]):
        labels = {category: label for label, category in enumerate(cat_ids)}
        rows_of = defaultdict(list)
        for row in read_detections(path):
            if row["category_id"] in labels:
                x, y, width, height = row["bbox"]
                rows_of[row["image_id"]].append((x, y, x + width, y + height, labels[row["category_id"]], row["score"]))
        self._rows_of = {image_id: np.asarray(rows, dtype=np.float64) for image_id, rows in rows_of.items()}

    def __getitem__(self, image_id) -> BoxPrompts:
        rows = self._rows_of.get(image_id, np.zeros((0, 6)))
        return BoxPrompts.of(rows[:, :4], rows[:, 4], rows[:, 5])
