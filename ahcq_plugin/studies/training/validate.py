# SPDX-License-Identifier: Apache-2.0
"""Held-out data: what is looked at during training. Test scenes and validation images are not among it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import predict_masks


def held_out_iou(
    sam: Sam, coco: str | Path | None, ids: list[int], scenes: int = 24, seed: int = 77
) -> dict[str, float]:
    """Mean IoU with ground-truth boxes on scenes of another seed and on held-out images, also for a blank image.

    In bfloat16: to follow a run, not to report.
    """
    groups = {"scenes": scene_items(scenes, seed, sam.image_encoder.img_size)}
    if coco is not None and ids:
        groups["images"] = coco_items(coco, ids)
    result = {}
    for name, items in groups.items():
        pairs = []
        for item in items:
            with torch.autocast(sam.device.type, torch.bfloat16):
                seen = predict_masks(sam, item.image, item.boxes)[0]
                unseen = predict_masks(sam, np.full_like(item.image, 120), item.boxes)[0]
            pairs += [(mask_iou(a, m), mask_iou(b, m)) for a, b, m in zip(seen, unseen, item.masks, strict=True)]
        means = np.mean(pairs, 0)
        result[name], result[f"{name}_blank"] = round(float(means[0]), 4), round(float(means[1]), 4)
    return result
