# SPDX-License-Identifier: Apache-2.0
"""From an image of any size and boxes to masks of that size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from ahcq_plugin.zoo.sam import box_forward


def input_image(sam: Sam, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """What SAM's image encoder takes for an image (H, W, 3) uint8 RGB: resized so that the longer side fills the input,
    normalised, zero-padded at the bottom and the right.

    Returns: float32 (1, 3, S, S) on SAM's device, and (height, width) without the padding.
    Raises: ValueError: an image of another type or shape, or one so narrow that nothing of it is left.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be (H, W, 3) uint8 RGB, got {found}")
    size = sam.image_encoder.img_size
    if vanishes(image.shape[:2], size):
        raise ValueError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels has no row or column left when its longer side is "
            f"resized to {size}: cut it into parts"
        )
    resized = ResizeLongestSide(size).apply_image(image)
    pixels = torch.as_tensor(resized, device=sam.device).permute(2, 0, 1)[None]
    return sam.preprocess(pixels), resized.shape[:2]


def vanishes(size: Sequence[int], side: int) -> bool:
    """Whether no row or no column is left of ``size`` (height, width) when its longer side is resized to ``side``."""
    return min(ResizeLongestSide.get_preprocess_shape(*size, side)) < 1


def input_boxes(sam: Sam, boxes: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) xyxy of an image of ``original_size`` (height, width) in pixels of SAM's input: float32 (N, 4)."""
    scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_boxes_torch(boxes, original_size)
    return scaled.reshape(-1, 4).to(sam.device)


def make_batch(sam: Sam, image: np.ndarray, boxes: np.ndarray) -> dict[str, Tensor]:
    """The input of :func:`~ahcq_plugin.zoo.sam.box_forward` for an image (H, W, 3) uint8 RGB and boxes (N, 4) xyxy.

    Raises: ValueError: see ``input_image``; boxes of another shape, or not finite.
    """
    corners = np.asarray(boxes, np.float32)
    if corners.shape[-1:] != (4,) or corners.ndim > 2 or not np.isfinite(corners).all():
        raise ValueError(f"boxes must be (N, 4) finite numbers x0, y0, x1, y1, got {boxes!r:.80}")
    corners = torch.from_numpy(corners.reshape(-1, 4))
    return {"image": input_image(sam, image)[0], "boxes": input_boxes(sam, corners, image.shape[:2])}


@torch.no_grad()
def predict_masks(sam: Sam, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One mask per box: bool (N, H, W) and the predicted IoU (N,), for arguments as in :func:`make_batch`."""
    logits, quality = box_forward(sam, make_batch(sam, image, boxes))
    return full_masks(sam, logits, image.shape[:2]), quality[:, 0].float().cpu().numpy()


def full_masks(sam: Sam, logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Masks bool (N, H, W) of an image of ``size`` (height, width) from SAM's logits (N, 1, h, w)."""
    shown = ResizeLongestSide.get_preprocess_shape(*size, sam.image_encoder.img_size)
    full = sam.postprocess_masks(logits.float(), shown, size)[:, 0]
    return (full > sam.mask_threshold).cpu().numpy()
