# SPDX-License-Identifier: Apache-2.0
"""The packaged SAM 2 on integers: the video predictor follows objects as on the fake-quantized model (slow)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.integer import to_integer
from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.zoo.clips import render_clip
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.segment import prepare_frames, segment_clip
from ahcq_plugin.zoo.track import clip_forward
from tests.integer.cases import BACKENDS
from tests.integer.comparing import differing_matmuls


def clips(count: int, seed: int, frames: int):
    """Generated clips: frames (T, H, W, 3) uint8, masks (T, N, H, W) bool."""
    return [render_clip((seed, index), frames, 128) for index in range(count)]


def batch_of(clip):
    return {"frames": prepare_frames(clip[0], 128), "masks": torch.from_numpy(clip[1][0])}


@cache
def quantized(recipe: str, bits: int) -> nn.Module:
    """sam2_tiny, calibrated on four clips, not reconstructed."""
    settings = {"name": recipe, "granularity": "none"}
    batches = [batch_of(clip) for clip in clips(4, 3, 3)]
    return quantize(build_sam2("sam2_tiny"), batches, settings, bits, bits, forward=clip_forward, progress=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bits"), [("ahcq", 4), ("rtn", 8)])
def test_videos_are_followed_as_by_the_fake_quantized_model(recipe, bits, record_property) -> None:
    """Masks near the fake-quantized model's, as near to the truth; every matmul, on equal codes, is the golden one."""
    qmodel = quantized(recipe, bits)
    integer = to_integer(qmodel)
    compared, wrong = differing_matmuls(qmodel, integer, [batch_of(clips(1, 5, 3)[0])], clip_forward, BACKENDS[0])
    assert compared > 200 and not wrong, wrong
    near, truth = [], {"fake": [], "integer": []}
    for images, masks in clips(6, 9, 6):
        runs = {
            name: np.stack(list(segment_clip(model, images, masks[0], False)))[1:]
            for name, model in (("fake", qmodel), ("integer", integer))
        }
        near += mask_iou(*runs.values()).ravel().tolist()
        for name, found in runs.items():
            truth[name] += mask_iou(found, masks[1:]).ravel().tolist()
    means = {name: float(np.mean(values)) for name, values in truth.items()}
    record_property("videos", (float(np.mean(near)), min(near), len(near), means))
    assert np.mean(near) >= (0.97 if bits == 8 else 0.85), np.mean(near)
    assert abs(means["fake"] - means["integer"]) <= 0.02, means
