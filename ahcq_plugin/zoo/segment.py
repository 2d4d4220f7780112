# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised video object segmentation with SAM 2: masks of the first frame in, masks of all frames out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ahcq_plugin.zoo.track import track

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare_frames(images: Iterable[np.ndarray], size: int) -> Tensor:
    """Frames (H, W, 3) uint8 RGB as the predictor loads them: resized to squares, normalised; (T, 3, size, size)."""
    rows = [np.asarray(Image.fromarray(image).resize((size, size))) for image in images]
    if not rows:
        raise ValueError("a clip needs at least one frame")
    frames = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (frames - mean) / std


def segment_clip(
    model: nn.Module, images: Iterable[np.ndarray], first_masks: np.ndarray, non_overlap: bool
) -> Iterator[np.ndarray]:
    """Follow objects through a clip by the official protocol.

    Args:
        model: a ``SAM2VideoPredictor``, quantized or not.
        images: all frames, (H, W, 3) uint8 RGB.
        first_masks: (N, H, W) bool, the objects in the first frame; one without a pixel there stays empty.
        non_overlap: a pixel goes to the object with the highest logit only (DAVIS), not to all above 0 (SA-V).

    Yields: for every frame (N, H, W) bool; those of the first frame went through the predictor's low resolution.
    Raises: ValueError when no object has a pixel.
    """
    first_masks = np.asarray(first_masks, bool)
    present = np.flatnonzero(first_masks.any((1, 2)))
    if not len(present):
        raise ValueError("the first frame shows no object to follow")
    frames = prepare_frames(images, model.image_size)
    with torch.inference_mode():
        for _, logits in track(model, frames, torch.from_numpy(first_masks[present])):
            shown = logits > 0
            if non_overlap:
                order = torch.arange(len(present), device=logits.device)[:, None, None]
                shown &= logits.argmax(0, keepdim=True) == order
            masks = np.zeros_like(first_masks)
            masks[present] = shown.cpu().numpy()
            yield masks
