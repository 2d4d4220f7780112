# SPDX-License-Identifier: Apache-2.0
"""SAM 2 through the engine: nothing changes until fake quantization is on; clips calibrate it; every recipe passes."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_clips, make_sam2

pytest.importorskip("sam2")
from ahcq_plugin import quantize
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers
from ahcq_plugin.ptq.loss import mask_error
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.track import clip_forward, track
from tests.ptq.test_stream_calls import assert_stream_equals_whole_runs

FAST = {"iterations": 2, "w_bits": 4, "a_bits": 4}


def assert_prepared_tracks_equally(model, clip, blocks: int, memory_layers: int) -> None:
    keys = set(model.state_dict())
    expected = clip_forward(model, clip)
    assert expected[1:].std() > 0.01 and expected.min() > -1000, "masks of this model say nothing"
    prepare(model, Recipe.from_config("ahcq"))
    assert len(prepared_units(model)) == blocks + 4 + memory_layers + 1 + 3
    names = tuple(name + "." for name, _ in quantizers(model))
    assert {key for key in model.state_dict() if not key.startswith(names)} == keys
    got = clip_forward(model, clip)
    difference = (got - expected).abs().max()
    assert difference < 1e-4 * expected[1:].std(), difference
    flips = ((got > 0) != (expected > 0)).float().mean()
    assert flips < 1e-5, flips


def test_the_prepared_predictor_tracks_as_the_original(small_sam2):
    assert_prepared_tracks_equally(small_sam2, make_clips(1, frames=9)[0], blocks=5, memory_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("sam2_t", 12), ("sam2_s", 16), ("sam2_bp", 24), ("sam2_l", 48)]
    + [("sam2.1_t", 12), ("sam2.1_s", 16), ("sam2.1_bp", 24), ("sam2.1_l", 48)],
)
def test_published_sizes_track_as_the_original(name, blocks):
    """12 frames, two objects, 256 pixels."""
    clip = make_clips(1, frames=12, size=256)[0]
    assert_prepared_tracks_equally(make_sam2({"name": name, "image_size": 256}), clip, blocks, memory_layers=4)


def test_units_get_the_inputs_of_both_models_call_by_call(small_sam2, small_clips):
    prepare(small_sam2, Recipe.from_config("rtn", w_bits=4, a_bits=4))
    calibrate(small_sam2, small_clips, clip_forward, progress=False)
    stream = UnitStream(small_sam2, small_clips, clip_forward)
    assert_stream_equals_whole_runs(small_sam2, small_clips, clip_forward, stream)


def test_order_and_number_of_calls(small_sam2, small_clips):
    """Frame by frame: image encoder, memory attention, decoder, memory encoder; the first frame needs no memory."""
    prepare(small_sam2, Recipe.from_config("rtn"))
    stream = UnitStream(small_sam2, small_clips[:1], clip_forward)
    frames, objects = 3, 2
    encoder = [
        *(f"image_encoder.trunk.blocks.{i}" for i in range(5)),
        *(f"image_encoder.neck.convs.{i}" for i in range(4)),
    ]
    memory = ["memory_attention.layers.0", "memory_attention.layers.1"]
    decoder = [f"sam_mask_decoder.transformer.{n}" for n in ("layers.0", "layers.1", "final_attn_token_to_image")]
    assert stream.order == [*encoder, *memory, *decoder, "memory_encoder"]
    calls = {**dict.fromkeys(encoder, frames), **dict.fromkeys(memory, (frames - 1) * objects)}
    calls |= dict.fromkeys([*decoder, "memory_encoder"], frames * objects)
    assert stream._reading.calls == calls
    assert stream._reading.settled == {*encoder}


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "ahcq"},
        {"name": "qdrop", "cache_device": "disk"},
        pytest.param({"name": "rtn"}, marks=pytest.mark.slow),
        pytest.param({"name": "adaround"}, marks=pytest.mark.slow),
        pytest.param({"name": "ptq4sam"}, marks=pytest.mark.slow),
        pytest.param(
            {"name": "ahcq", "agq": True, "lnq": False, "big": True, "condiquant": True, "acnr": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda recipe: "-".join(recipe.values()) if len(recipe) < 3 else "ahcq-other-components",
)
def test_every_recipe_runs_on_clips_and_passes_the_audit(small_sam2, recipe):
    small_clips = make_clips(2, frames=2)
    reference = clip_forward(small_sam2, small_clips[0])
    model, report = quantize(small_sam2, small_clips, recipe, forward=clip_forward, progress=False, **FAST)
    assert report.audit.passed and len(report.units) == 15
    wanted = Recipe.from_config(recipe)
    for name, unit in prepared_units(model).items():
        for _, quantizer in quantizers(unit):
            assert quantizer.role == "weight" or quantizer.family == wanted.family(quantizer.role, name)
    out = clip_forward(model, small_clips[0])
    error = (out[1:] - reference[1:]).square().mean() / reference[1:].var()
    assert 0 < error < 1
    clip = small_clips[0]
    served = torch.stack([logits for _, logits in track(model, clip["frames"], clip["masks"])])  # in inference mode
    assert torch.equal(served, out)


@pytest.mark.slow
def test_tuning_goes_through_the_memory(small_sam2, small_clips):
    """The loss of later frames alone reaches what computes the memory of the first."""
    items = small_clips[:1]

    def later(out, target):
        return mask_error(out[1:], target[1:])

    recipe = {"name": "rtn", "w_bits": 4, "a_bits": 4, "tune_steps": 6, "tune_lr": 1e-2, "tune_scale_lr": 1e-3}
    model, report = quantize(small_sam2, items, recipe, forward=clip_forward, loss=later, progress=False)
    assert report.audit.passed and report.tuning.loss_after < report.tuning.loss_before
    plain, _ = quantize(small_sam2, items, {**recipe, "tune_steps": 0}, forward=clip_forward, progress=False)
    before = dict(plain.named_parameters())
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"image_encoder", "memory_attention", "sam_mask_decoder", "memory_encoder"} <= changed
