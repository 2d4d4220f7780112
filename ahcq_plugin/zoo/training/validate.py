# SPDX-License-Identifier: Apache-2.0
"""Held-out data: what is looked at during training. Test scenes and validation images are not among it."""
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam

from ahcq_plugin.zoo.predict import Item, mask_iou, predict_masks
from ahcq_plugin.zoo.scenes import box_of, render_scene


def scene_items(count: int, seed: int, size: int = 256) -> Iterator[Item]:
    """``count`` scenes, ``render_scene((seed, i), size)``, with tight boxes; scenes without objects are passed over."""
    for index in range(count):
        image, masks = render_scene((seed, index), size)
        if masks:
            yield image, np.array([box_of(mask) for mask in masks], np.float32), masks


def coco_items(folder: str | Path, ids: list[int] | None = None) -> Iterator[Item]:
    """The images of a COCO folder (``instances.json``, ``images/``) with the annotated boxes; crowds are left out."""
    from pycocotools.coco import COCO

    folder = Path(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    for image_id in sorted(coco.imgs) if ids is None else ids:
        annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        if not annotations:
            continue
        path = folder / "images" / Path(coco.imgs[image_id]["file_name"]).name
        image = cv2.imread(str(path))
        if image is None:
            raise FileNotFoundError(f"cannot read image {path}")
        boxes = np.array([a["bbox"] for a in annotations], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        yield image[..., ::-1], boxes, [coco.annToMask(a).astype(bool) for a in annotations]


def held_out_iou(sam: Sam, coco: str | Path | None, ids: list[int], scenes: int = 24, seed: int = 77) -> dict[str, float]:
    """Mean IoU with ground-truth boxes on scenes of another seed and on held-out images, also for a blank image."""
    groups = {"scenes": scene_items(scenes, seed, sam.image_encoder.img_size)}
    if coco is not None and ids:
        groups["images"] = coco_items(coco, ids)
    result = {}
    for name, items in groups.items():
        pairs = []
        for image, boxes, masks in items:
            with torch.autocast(sam.device.type, torch.bfloat16):
                guess = predict_masks(sam, image, boxes)[0]
                blank = predict_masks(sam, np.full_like(image, 120), boxes)[0]
            pairs += [(mask_iou(g, m), mask_iou(b, m)) for g, b, m in zip(guess, blank, masks)]
        seen, unseen = np.mean(pairs, 0)
        result[name], result[f"{name}_blank"] = round(float(seen), 4), round(float(unseen), 4)
    return result
