# SPDX-License-Identifier: Apache-2.0
"""The four graphs of a SAM 2 and the driver that follows objects with them, beside SAM 2's own predictor."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.conftest import make_clips, make_sam2

pytest.importorskip("sam2")
from ahcq_plugin.export import export_onnx
from ahcq_plugin.export.onnx_resize import resize_bilinear
from ahcq_plugin.export.onnx_sam2 import OnnxSam2
from ahcq_plugin.export.onnx_sam2_bundle import write_sam2_bundle
from ahcq_plugin.export.onnx_sam2_memory import as_bfloat16
from ahcq_plugin.export.onnx_sam2_parts import SineCosineRotation
from ahcq_plugin.export.onnx_sam2_video import Video
from ahcq_plugin.graph.untraceable import rotate
from ahcq_plugin.zoo.track import start_state, track

ROOT = Path(__file__).resolve().parents[2]
FRAMES, SIZE = 7, (48, 80)
#: Options of SAM 2 that the driver follows by the JSON: those of the published 2.1, and all others at once.
OPTIONS = {
    "as packaged": {},
    "as published": {
        "multimask_output_in_sam": True,
        "multimask_output_for_tracking": True,
        "use_multimask_token_for_obj_ptr": True,
        "multimask_min_pt_num": 0,
    },
    "others": {
        "multimask_output_in_sam": True,
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.002,
        "binarize_mask_from_pts_for_mem_enc": True,
        "memory_temporal_stride_for_eval": 2,
        "max_cond_frames_in_attn": 2,
        "add_all_frames_to_correct_as_cond": True,
        "only_obj_ptrs_in_the_past_for_eval": False,
        "use_signed_tpos_enc_to_obj_ptrs": False,
        "fixed_no_obj_ptr": False,
        "num_maskmem": 4,
    },
}


@pytest.fixture(scope="module")
def model():
    return make_sam2()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sam2")
    export_onnx(model, path, style="float")
    return path


@pytest.fixture
def with_options(model, folder, request):
    """The model and its folder with options of SAM 2; the graphs do not depend on them."""
    options, decoder = OPTIONS[request.param], model.sam_mask_decoder
    owners = {name: model if hasattr(model, name) else decoder for name in options}
    owners |= {name: decoder for name in options if hasattr(decoder, name)}
    before = {name: getattr(owners[name], name) for name in options}
    for name, value in options.items():
        setattr(owners[name], name, value)
    write_sam2_bundle(model, folder, "float")
    yield model, folder
    for name, value in before.items():
        setattr(owners[name], name, value)
    write_sam2_bundle(model, folder, "float")


def session(model, frames):
    """Prompts and results of SAM 2's predictor by the names of the driver."""
    state = start_state(model, frames, SIZE)

    def prompt(frame, name, points=None, labels=None, box=None, mask=None):
        if mask is not None:
            out = model.add_new_mask(state, frame, name, mask)
        else:
            out = model.add_new_points_or_box(state, frame, name, points, labels, box=box)
        return out[2][out[1].index(name), 0].numpy()

    def propagate(start=None, count=None, reverse=False):
        for frame, _, logits in model.propagate_in_video(state, start, count, reverse):
            yield frame, logits[:, 0].numpy()

    return prompt, propagate


def script(prompt, propagate):
    """Everything that a user may do with two objects; all logits, in order."""
    point, label = np.array([[30.0, 20.0], [60.0, 40.0]]), np.array([1, 0])
    mask = np.zeros((40, 56), bool)
    mask[8:30, 12:40] = True
    yield prompt(0, "a", point[:1], label[:1])
    yield prompt(0, "a", point, label)  # refines what the first click gave
    yield prompt(0, "b", mask=mask)
    yield prompt(4, "b", point[1:], label[:1], box=np.array([10.0, 12.0, 50.0, 40.0]))
    for _, logits in propagate():
        yield logits
    yield prompt(3, "a", point[1:], label[1:])  # corrects a frame that was followed
    yield prompt(5, "a", box=np.array([8.0, 9.0, 70.0, 30.0]))
    yield prompt(6, "b", mask=np.zeros((40, 56), bool))  # an object that is not seen
    for _, logits in propagate(2, 3):
        yield logits
    for _, logits in propagate(5, reverse=True):
        yield logits


@pytest.mark.parametrize("with_options", OPTIONS, indirect=True)
def test_prompts_memories_and_masks_are_those_of_the_predictor(with_options):
    model, folder = with_options
    frames = make_clips(1, frames=FRAMES)[0]["frames"]
    with torch.inference_mode():
        wanted = list(script(*session(model, frames)))
    video = Video(OnnxSam2(folder, 1), frames.numpy(), SIZE)
    found = list(script(video.prompt, video.propagate))
    assert len(found) == len(wanted) == 4 + FRAMES + 3 + 4 + 6
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == np.float32
        assert np.abs(a - b).max() <= 2e-5 * max(np.abs(b).max(), 1), number
    moving = np.stack([logits for logits in wanted if logits.ndim == 3])
    assert moving.std(0).max() > 1e-3, "masks of this model say nothing"
