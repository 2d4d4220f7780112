# SPDX-License-Identifier: Apache-2.0
"""The four graphs of a SAM 2 and the driver that follows objects with them, beside SAM 2's own predictor."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.conftest import ROOT, SMALL_SAM2, make_clips, make_sam2

pytest.importorskip("sam2")
from ahcq_plugin.export import OnnxSam, OnnxSam2, Video, export_onnx
from ahcq_plugin.export.onnx_bundle import BUNDLE_FILE, read_bundle
from ahcq_plugin.export.onnx_graphs import deploy_model
from ahcq_plugin.export.onnx_resize import resize_bilinear
from ahcq_plugin.export.onnx_sam2_bundle import GRAPHS, write_sam2_bundle
from ahcq_plugin.export.onnx_sam2_memory import as_bfloat16
from ahcq_plugin.export.onnx_sam2_parts import SineCosineRotation
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.untraceable import rotate
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies.inference.runners import GraphSam2, TorchSam2
from ahcq_plugin.studies.inference.timing import noise, quantized_by_guess
from ahcq_plugin.zoo.segment import prepare_frames
from ahcq_plugin.zoo.track import clip_forward, start_state

FRAMES, SIZE = 5, (48, 80)
#: Two runtimes sum in another order; a wrong rule changes some logit by 10 times as much, or more.
LIMIT = 5e-6
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
        "max_obj_ptrs_in_encoder": 3,
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


@pytest.fixture(scope="module")
def driver(folder):
    return OnnxSam2(folder, 1)


@pytest.fixture
def with_options(model, folder, driver, request, monkeypatch):
    """The model, and the driver of its folder, with options of SAM 2; the graphs do not depend on them."""
    options, decoder = OPTIONS[request.param], model.sam_mask_decoder
    owners = {name: model if hasattr(model, name) else decoder for name in options}
    owners |= {name: decoder for name in options if hasattr(decoder, name)}
    for name, value in options.items():
        monkeypatch.setattr(owners[name], name, value)
    write_sam2_bundle(model, folder, "float")
    monkeypatch.setattr(driver, "bundle", read_bundle(folder))
    return model, driver


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
    yield prompt(2, "a", box=np.array([8.0, 9.0, 70.0, 30.0]))
    yield prompt(4, "b", mask=np.zeros((40, 56), bool))  # an object that is not seen
    for _, logits in propagate(1, 2):
        yield logits
    for _, logits in propagate(3, reverse=True):
        yield logits


def worst(found, wanted):
    """The largest difference of logits, in shares of the largest one of their frame, or of 1."""
    assert [a.shape for a in found] == [b.shape for b in wanted]
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("with_options", OPTIONS, indirect=True)
def test_prompts_memories_and_masks_are_those_of_the_predictor(with_options):
    model, driver = with_options
    frames = make_clips(1, frames=FRAMES)[0]["frames"]
    with torch.inference_mode():
        wanted = list(script(*session(model, frames)))
    video = Video(driver, frames.numpy(), SIZE)
    found = list(script(video.prompt, video.propagate))
    assert len(found) == 4 + FRAMES + 3 + 3 + 4 and all(logits.dtype == np.float32 for logits in found)
    assert worst(found, wanted) <= LIMIT
    assert np.stack([logits for logits in wanted if logits.ndim == 3]).std(0).max() > 1e-3, "masks say nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("with_options", "untouched"),
    [
        ("others", {"of_prompted_frames", "of_tracked_frames", "points", "pointer_of_chosen"}),  # all are unstable
        (
            "as published",
            {"prompted_frames", "pointers", "times_have_signs", "when_unstable", "absent_pointer_replaces"},
        ),
    ],
    indirect=["with_options"],
)
def test_every_rule_of_the_json_matters(with_options, untouched):
    """One rule changed, and logits are others: the test above would notice. No rule is untouched by both scripts."""
    _, sam = with_options
    frames = make_clips(1, frames=FRAMES)[0]["frames"].numpy()
    rules = copy.deepcopy(sam.bundle)

    def run():
        video = Video(sam, frames, SIZE)
        return list(script(video.prompt, video.propagate))

    right, same = run(), []
    for section in ("multimask", "memory"):
        for name, value in rules[section].items():
            sam.bundle = copy.deepcopy(rules)
            changed = not value if isinstance(value, bool) else None if isinstance(value, dict) else value
            if isinstance(value, list):
                changed = [value[0] + 1, value[1] + 1]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                changed = value + (-1 if name == "frames" else 1)
            sam.bundle[section][name] = changed
            if not isinstance(value, str) and worst(run(), right) <= 2 * LIMIT:
                same.append(name)
    assert set(same) <= untouched, same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam2_t", "sam2.1_t"])
def test_published_sizes(name, tmp_path):
    """With all options as published, 256 pixels, in both runtimes."""
    model = make_sam2({"name": name, "image_size": 256})
    export_onnx(model, tmp_path, style="float")
    frames = make_clips(1, frames=FRAMES, size=256)[0]["frames"]
    with torch.inference_mode():
        wanted = list(script(*session(model, frames)))
    for runtime in ("onnxruntime", "openvino"):
        video = Video(OnnxSam2(tmp_path, 2, runtime), frames.numpy(), SIZE)
        assert worst(list(script(video.prompt, video.propagate)), wanted) <= 10 * LIMIT, runtime


@torch.no_grad()
def test_boxes_of_an_image_are_those_of_pytorch(model, folder):
    """Image encoder and mask decoder alone, without a memory, several boxes in one call."""
    given = noise(model.image_size, 3)
    graphs, wanted = GraphSam2(model, folder, "onnxruntime", 1), TorchSam2(model)
    features, others = graphs.encode(given["image"]), wanted.encode(given["image"])
    pairs = zip([*features[1:], features[0]], others, strict=True)  # PyTorch has the finest first
    for mine, theirs in pairs:
        assert worst([mine], [theirs.numpy()]) < LIMIT
    found = graphs.decode(features, given["boxes"])
    assert found.shape[0] == 3 and worst([found.numpy()], [wanted.decode(others, given["boxes"]).numpy()]) < LIMIT


@pytest.mark.slow
def test_openvino_follows_as_onnxruntime(folder):
    clip = make_clips(1)[0]
    runs = [
        [logits for _, logits in OnnxSam2(folder, 1, runtime).track(clip["frames"].numpy(), clip["masks"].numpy())]
        for runtime in ("onnxruntime", "openvino")
    ]
    assert len(runs[0]) == len(clip["frames"]) and worst(*runs) <= LIMIT


@pytest.fixture(scope="module")
def quantized():
    """All families, 8 bits."""
    recipe = {"name": "rtn", "cag": True, "hluq": True, "lnq": True, "w_bits": 8, "a_bits": 8}
    return quantized_by_guess(make_sam2({**SMALL_SAM2, "memory_layers": 1}), Recipe.from_config(recipe))


@pytest.mark.parametrize("style", [pytest.param("exact", marks=pytest.mark.slow), "deploy"])
def test_quantized_graphs_compute_what_the_model_does_in_pytorch(style, quantized, tmp_path):
    """Frame by frame as long as no code flips: the image encoder and all that follows it are quantized."""
    export_onnx(quantized, tmp_path, style=style)
    content = json.loads((tmp_path / BUNDLE_FILE).read_text())
    assert content["style"] == style and list(content["bytes"]) == [*GRAPHS, "constants.npz"]
    clip = make_clips(1, frames=3)[0]
    wanted = clip_forward(quantized if style == "exact" else deploy_model(quantized), clip)[1:]
    sam = OnnxSam2(tmp_path, 1)
    found = np.stack([logits for _, logits in sam.track(clip["frames"].numpy(), clip["masks"].numpy())])[1:]
    error = float((torch.from_numpy(found) - wanted).norm() / wanted.norm())
    assert 0 < error < 0.01, error
    if style == "exact":  # of 2026.4: it has no groups of channels in a tensor whose sizes are free
        with pytest.raises(ValueError, match=r"OpenVINO does not take .*memory_attention.*use style 'deploy', or onnx"):
            OnnxSam2(tmp_path, 1, "openvino")


class Remembering(torch.nn.Module):
    """A layer of the memory attention as a function of tensors alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tgt, memory):
        return self.layer(tgt=tgt, memory=memory, pos=memory.flip(1), query_pos=tgt.flip(1), num_k_exclude_rope=2)


@torch.no_grad()
def test_a_layer_with_rotations_exports_by_itself(quantized, tmp_path):
    """Complex numbers, which ONNX has none of, leave the graph and not the model."""
    layer = Remembering(prepared_units(quantized)["memory_attention.layers.0"])
    made = torch.Generator().manual_seed(0)
    tgt, memory = torch.randn(1, 16, 32, generator=made), torch.randn(1, 18, 16, generator=made)
    wanted = layer(tgt, memory)
    export_onnx(layer, tmp_path / "layer.onnx", (tgt, memory))
    session = onnxruntime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"tgt": tgt.numpy(), "memory": memory.numpy()})
    # a code on a boundary may flip where float products round in another order
    assert float((torch.from_numpy(got) - wanted).norm()) < 0.01 * float(wanted.norm())
    assert torch.equal(layer(tgt, memory), wanted)


@pytest.mark.parametrize("unrotated", [0, 3])
@pytest.mark.parametrize("grids", [1, 3])
def test_rotation_by_sines_is_that_by_complex_numbers(unrotated, grids):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, n, 8, generator=generator) for n in (9, 9 * grids + unrotated))
    rotation = SineCosineRotation(100.0, True)
    for count in (unrotated, torch.tensor(unrotated)):
        for a, b in zip(rotation(q, k, count), rotate(q, k, unrotated, 100.0, True), strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=1e-6)
    assert torch.equal(rotation(q, k, unrotated)[1][..., 9 * grids :, :], k[..., 9 * grids :, :])
    own = SineCosineRotation(100.0, False)(q, q, 0)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(own, rotate(q, q, 0, 100.0, False), strict=True))


# PyTorch 2.5 repeats the first pixel of an axis where the other has one, with antialiasing
@settings(max_examples=40)
@given(st.tuples(*[st.integers(2, 40)] * 4), st.booleans(), st.integers(0, 2**31))
def test_resizing_is_that_of_pytorch(sizes, antialias, seed):
    height, width, new_height, new_width = sizes
    x = np.random.default_rng(seed).normal(size=(2, height, width)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(x)[None], (new_height, new_width), mode="bilinear", antialias=antialias)[0]
    found = resize_bilinear(x, (new_height, new_width), antialias)
    assert found.dtype == np.float32 and np.abs(found - wanted.numpy()).max() <= 2e-5


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126))))
def test_bfloat16_is_that_of_pytorch(values):
    x = np.array(values, np.float32)
    assert np.array_equal(as_bfloat16(x), torch.from_numpy(x).bfloat16().float().numpy())


def test_frames_are_prepared_as_for_the_predictor(driver):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)]
    for image in images:
        assert np.array_equal(driver.prepare(image)[0], prepare_frames([image], 64)[0].numpy())
    with pytest.raises(ValueError, match=r"a frame must be \(H, W, 3\) uint8 RGB, or \(3, 64, 64\) float32 .*got"):
        driver.prepare(np.zeros((64, 64, 3), np.float32))


def test_videos_need_no_pytorch(folder):
    """Neither the driver nor anything that it imports."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np
from ahcq_plugin.export import OnnxSam2, Video
video = Video(OnnxSam2({str(folder)!r}, 1), [np.full((48, 64, 3), 90 * n, np.uint8) for n in range(2)])
assert video.prompt(0, "box", box=np.array([5, 5, 40, 40])).shape == (48, 64)
assert [(n, x.shape) for n, x in video.propagate()] == [(0, (1, 48, 64)), (1, (1, 48, 64))]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_errors(model, folder, driver, tmp_path):
    other = copy.deepcopy(model)
    other.fill_hole_area = 8
    with pytest.raises(ValueError, match="got fill_hole_area=8: build it without post-processing"):
        export_onnx(other, tmp_path, style="float")
    other.fill_hole_area, other.num_maskmem = 0, 0
    with pytest.raises(ValueError, match="`num_maskmem` must be at least 1, got 0"):
        export_onnx(other, tmp_path, style="float")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        ValueError, match=r"its format is 'ahcq_plugin.bundle.sam2/1', this reads 'ahcq_plugin.bundle/1'"
    ):
        OnnxSam(folder)
    video = Video(driver, [np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(RuntimeError, match="no object to follow: call prompt first"):
        next(video.propagate())
    box, mask = np.zeros(4), np.zeros((8, 8), bool)
    for wrong, message in (
        ({"frame": 1, "mask": mask}, r"`frame` must lie in \[0, 0\], got 1"),
        ({"frame": 0}, "give points, a box or both, or a mask alone"),
        ({"frame": 0, "mask": mask, "box": box}, "or a mask alone"),
        ({"frame": 0, "points": np.zeros((1, 2))}, "belong together, got one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            video.prompt(name="a", **wrong)
