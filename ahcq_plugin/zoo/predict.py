# SPDX-License-Identifier: Apache-2.0
"""From an image of any size and boxes to masks of that size."""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from ahcq_plugin.zoo.sam import box_forward


def make_batch(sam: Sam, image: np.ndarray, boxes: np.ndarray) -> dict[str, Tensor]:
    """The input of :func:`~ahcq_plugin.zoo.sam.box_forward` for an image (H, W, 3) uint8 RGB and boxes (N, 4) xyxy.

    Resized so that the longer side fills the model's input, normalised, zero-padded at the bottom and the right.
    """
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    pixels = torch.from_numpy(np.ascontiguousarray(resize.apply_image(image))).permute(2, 0, 1)
    scaled = resize.apply_boxes(np.asarray(boxes, np.float32).reshape(-1, 4), image.shape[:2])
    return {
        "image": sam.preprocess(pixels[None].to(sam.device).float()),
        "boxes": torch.from_numpy(scaled.astype(np.float32)).to(sam.device),
    }


@torch.no_grad()
def predict_masks(sam: Sam, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One mask per box: bool (N, H, W) and the predicted IoU (N,), for arguments as in :func:`make_batch`."""
    batch = make_batch(sam, image, boxes)
    logits, quality = box_forward(sam, batch)
    scale = sam.image_encoder.img_size / max(image.shape[:2])
    shown = (int(image.shape[0] * scale + 0.5), int(image.shape[1] * scale + 0.5))
    full = sam.postprocess_masks(logits.float(), shown, image.shape[:2])[:, 0]
    return (full > sam.mask_threshold).cpu().numpy(), quality[:, 0].float().cpu().numpy()


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks of one shape; 0 when both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0
