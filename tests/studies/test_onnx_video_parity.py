# SPDX-License-Identifier: Apache-2.0
"""The four graphs of SAM 2s beside PyTorch, as tools/export_bundle.py measures them (slow)."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("sam2")
from ahcq_plugin import quantize, save_quantized
from ahcq_plugin.export import OnnxSam2, export_onnx
from ahcq_plugin.export.onnx_bundle import read_bundle
from ahcq_plugin.studies.onnx_video_parity import PARTS, follow, generated_clips, measure_videos, overlaps_of
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.segment import prepare_frames
from ahcq_plugin.zoo.track import clip_forward


def make_batches(count: int):
    """Items of calibration."""
    clips = generated_clips(count, 3, 128, frames=3)
    return [{"frames": prepare_frames(i, 128), "masks": torch.from_numpy(m)} for i, m in clips]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_packaged_model_in_floating_point(runtime, tmp_path):
    """Masks of every frame are those of SAM 2's own predictor."""
    model = build_sam2("sam2_tiny")
    export_onnx(model, tmp_path, style="float")
    clips = generated_clips(8, 7, model.image_size)
    wanted = [follow(model, prepare_frames(images, model.image_size), masks) for images, masks in clips]
    sam = OnnxSam2(tmp_path, 1, runtime)
    found = [torch.from_numpy(np.stack([x for _, x in sam.track(list(images), masks)])) for images, masks in clips]
    overlaps = overlaps_of(wanted, found)
    assert len(overlaps) > 100 and float(overlaps.min()) >= 0.98 and float(overlaps.mean()) >= 0.999


@pytest.mark.slow
def test_the_packaged_model_as_deployed(tmp_path):
    """W8A8 with uniform quantizers, through the tool, near the fake-quantized model's masks in both runtimes."""
    qmodel, _ = quantize(build_sam2("sam2_tiny"), make_batches(4), "rtn", 8, 8, forward=clip_forward, progress=False)
    save_quantized(qmodel, tmp_path / "q.safetensors")
    command = [sys.executable, str(ROOT / "tools/export_bundle.py"), str(tmp_path / "q.safetensors")]
    command += ["-o", str(tmp_path / "bundle"), "--images", "4", "--runs", "2", "--runtimes", "onnxruntime", "openvino"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    rows = read_bundle(tmp_path / "bundle")["parity"]
    assert [row["runtime"] for row in rows] == ["onnxruntime", "openvino"]
    assert all(row["iou"] >= 0.97 and list(row["parts"]) == list(PARTS) for row in rows), rows
    assert "| onnxruntime | " in run.stdout and "memory_attention.onnx: " in run.stdout


@pytest.mark.slow
def test_figures_of_a_folder(tmp_path):
    """Graphs of another model are far from PyTorch's masks, those of the model itself near."""
    settings = {"name": "rtn", "w_bits": 4, "a_bits": 8}
    qmodel, _ = quantize(build_sam2("sam2_tiny"), make_batches(1), settings, forward=clip_forward, progress=False)
    other = copy.deepcopy(qmodel)
    for parameter in other.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].parameters():
        parameter.data.neg_()  # so are the logits
    found = []
    for name, model in (("own", qmodel), ("other", other)):
        export_onnx(model, tmp_path / name, style="deploy")
        clips = generated_clips(2, 7, 128, frames=3)
        (row,) = measure_videos(qmodel, build_sam2("sam2_tiny"), tmp_path / name, clips, ["onnxruntime"], 2)
        assert row.masks == sum(2 * len(masks) for _, masks in clips) and list(row.parts) == list(PARTS)
        assert row.to_dict()["parts"]["mask_decoder"]["ratio"] == row.parts["mask_decoder"].ratio > 0
        assert len(row.lines()) == len(PARTS) and 0.5 < row.nudged_iou <= 1
        found.append(row)
    assert found[0].iou > 0.9 > found[1].iou
