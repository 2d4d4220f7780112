# SPDX-License-Identifier: Apache-2.0
"""SAM 2's video predictor over a clip that is in memory: first-frame masks in, masks of every frame out."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

_PER_OBJECT = (
    "point_inputs_per_obj",
    "mask_inputs_per_obj",
    "output_dict_per_obj",
    "temp_output_dict_per_obj",
    "frames_tracked_per_obj",
)


def start_state(predictor: nn.Module, frames: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """What ``predictor.init_state`` returns, for frames in memory instead of a folder.

    Args:
        predictor: a ``SAM2VideoPredictor``.
        frames: (T, 3, S, S) float32, normalised, S = ``predictor.image_size``; moved to the device frame by frame.
        size: (height, width) that masks are returned in.
    """
    expected = (3, predictor.image_size, predictor.image_size)
    if frames.ndim != 4 or tuple(frames.shape[1:]) != expected:
        raise ValueError(
            f"`frames` must be (T, {', '.join(map(str, expected))}), got {tuple(frames.shape)}: resize them"
        )
    device = next(predictor.parameters()).device
    state: dict[str, Any] = {"images": frames, "num_frames": len(frames), "device": device, "storage_device": device}
    state |= {"video_height": int(size[0]), "video_width": int(size[1])}
    state |= {"offload_video_to_cpu": frames.device != device, "offload_state_to_cpu": False}
    state |= {"cached_features": {}, "constants": {}, "obj_ids": []}
    state |= {"obj_id_to_idx": OrderedDict(), "obj_idx_to_id": OrderedDict()}
    return state | {name: {} for name in _PER_OBJECT}


def track(
    predictor: nn.Module, frames: Tensor, masks: Tensor, size: tuple[int, int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Propagate first-frame masks through a clip, as ``add_new_mask`` on frame 0 and ``propagate_in_video`` do.

    Args:
        frames: as in :func:`start_state`.
        masks: (N, h, w) bool, one object each, of any size; at least one.
        size: of the returned masks; None: that of ``masks``.
    Yields:
        (frame number, (N, height, width) float32 logits), from frame 0 on; a pixel is the object's where they are > 0.
    """
    if masks.ndim != 3 or not len(masks):
        raise ValueError(f"`masks` must be (N, h, w) with N >= 1, got {tuple(masks.shape)}")
    state = start_state(predictor, frames, size or tuple(masks.shape[-2:]))
    for number, mask in enumerate(masks):
        predictor.add_new_mask(state, 0, number, mask)
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        for frame, _, logits in predictor.propagate_in_video(state, start_frame_idx=0):
            yield frame, logits[:, 0]


def clip_forward(predictor: nn.Module, clip: Mapping[str, Tensor]) -> Tensor:
    """The ``forward`` of calibration and reconstruction: one item is a clip.

    Args:
        predictor: a ``SAM2VideoPredictor``, quantized or not.
        clip: ``frames`` (T, 3, S, S) and ``masks`` (N, h, w) as in :func:`track`.
    Returns:
        Logits (T, N, h, w) float32. Unlike the predictor's own methods this runs without ``torch.inference_mode``: as
        from any module, gradients go through it, and through the memory from frame to frame, unless the caller
        switches them off.
    """
    with without_inference_mode(predictor):
        return torch.stack([logits for _, logits in track(predictor, clip["frames"], clip["masks"])])


@contextmanager
def without_inference_mode(predictor: nn.Module) -> Iterator[None]:
    """Within the context, the predictor's methods are the functions below their decorators."""
    plain = {
        name: method.__wrapped__
        for kind in reversed(type(predictor).__mro__)
        for name, method in vars(kind).items()
        if callable(method) and hasattr(method, "__wrapped__")
    }
    try:
        for name, function in plain.items():
            vars(predictor)[name] = function.__get__(predictor)
        yield
    finally:
        for name in plain:
            vars(predictor).pop(name, None)
