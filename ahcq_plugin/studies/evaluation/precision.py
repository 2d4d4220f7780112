# SPDX-License-Identifier: Apache-2.0
"""COCO mask AP of box-prompted masks, beside filled boxes and ellipses."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything.modeling import Sam

from ahcq_plugin.studies.evaluation.iou import filled_box, filled_ellipse
from ahcq_plugin.zoo.items import coco_items, read_coco, read_image
from ahcq_plugin.zoo.predict import predict_masks

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Prompts = tuple[int, np.ndarray, np.ndarray, list[int], list[float]]  # image id, image, boxes, categories, scores


def ground_truth_prompts(folder: str | Path) -> Iterator[Prompts]:
    """Every annotated box of a COCO folder, with score 1."""
    for item in coco_items(folder):
        yield item.image_id, item.image, item.boxes, item.categories, [1.0] * len(item.boxes)


def detector_prompts(folder: str | Path, detections: Sequence[Mapping[str, Any]], lowest: float) -> Iterator[Prompts]:
    """Boxes of a detector (COCO results format) with at least the score ``lowest``."""
    coco = read_coco(folder)
    for image_id in sorted(coco.imgs):
        kept = [d for d in detections if d["image_id"] == image_id and d["score"] >= lowest]
        if kept:
            boxes = np.array([d["bbox"] for d in kept], np.float32)
            boxes[:, 2:] += boxes[:, :2]
            yield (
                image_id,
                read_image(folder, coco.imgs[image_id]["file_name"]),
                boxes,
                [d["category_id"] for d in kept],
                [d["score"] for d in kept],
            )


def mask_ap(sam: Sam, folder: str | Path, prompts: Iterator[Prompts]) -> dict[str, dict[str, float]]:
    """AP of the model's masks and of filled boxes and ellipses for the same prompts.

    The score of a mask is the prompt's; the model's is not multiplied by its predicted IoU, so that the three rows
    rank alike.
    """
    shapes: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
        "filled box": filled_box,
        "ellipse": filled_ellipse,
    }
    rows: dict[str, list[dict[str, Any]]] = {"model": [], **{name: [] for name in shapes}}
    for image_id, image, boxes, categories, scores in prompts:
        masks = predict_masks(sam, image, boxes)[0]
        for i, box in enumerate(boxes):
            answers = {"model": masks[i], **{name: fill(box, image.shape[:2]) for name, fill in shapes.items()}}
            for name, mask in answers.items():
                rows[name].append(
                    {
                        "image_id": image_id,
                        "category_id": categories[i],
                        "score": scores[i],
                        "segmentation": _compressed(mask),
                    }
                )
    return {name: _evaluate(folder, results) for name, results in rows.items()}


def _compressed(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coder

    return coder.encode(np.asfortranarray(mask.astype(np.uint8)))


def _evaluate(folder: str | Path, results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    coco = read_coco(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(coco, coco.loadRes(results), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(value) for name, value in zip(METRICS, run.stats, strict=False)}
