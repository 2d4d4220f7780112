# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.api import load_quantized, quantize, save_quantized
from ahcq_plugin.prequant.streams import two_way_streams
from ahcq_plugin.studies.hardness import statistics
from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.hard import SAM_TINY_HARD, Hardness, hard_config, harden, knobs, off
from ahcq_plugin.zoo.invariances import attentions, split_gelu_units
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.rebuild import built_as, rebuild, rebuild_from_state
from ahcq_plugin.zoo.sam import box_forward, build_sam, name_of_state
from tests.conftest import TINY_SAM, make_tiny_items, make_tiny_sam

#: Knob -> the statistics of ``statistics`` that it raises.
RAISES = {
    "channels": ("channel ratio, encoder", "condition number"),
    "offsets": ("channel ratio, decoder",),
    "values": ("channel ratio, values",),
    "queries": ("channel ratio, queries",),
    "keys": ("bimodality of keys",),
    "tails": ("reach after activations",),
}


@pytest.fixture(scope="module")
def double_sam():
    sam = make_tiny_sam().double()
    sam.prompt_encoder.float()  # segment_anything computes positions in float32
    return sam


@pytest.fixture(scope="module")
def double_items():
    return [{**item, "image": item["image"].double()} for item in make_tiny_items()]


def worst_difference(sam, twin, items) -> float:
    """Largest difference of logits and of predicted quality, by the largest value."""
    worst = 0.0
    with torch.no_grad():
        for item in items:
            for a, b in zip(box_forward(sam, item), box_forward(twin, item), strict=True):
                assert a.dtype == b.dtype == torch.float64
                worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    strengths=st.fixed_dictionaries(
        {knob: st.one_of(st.just(off(knob)), st.floats(off(knob), 200.0)) for knob in knobs()}
    ),
)
def test_masks_stay_as_they_are(double_sam, double_items, seed: int, strengths: dict) -> None:
    twin = harden(copy.deepcopy(double_sam), Hardness(seed=seed, **strengths))
    assert worst_difference(double_sam, twin, double_items) < 1e-6


@pytest.mark.parametrize("knob", knobs())
def test_a_knob_raises_its_statistic_and_changes_nothing_in_float64(double_sam, double_items, knob: str) -> None:
    twin = harden(copy.deepcopy(double_sam), SAM_TINY_HARD.only(knob))
    assert worst_difference(double_sam, twin, double_items) < 1e-9
    before, after = (statistics(sam, double_items, box_forward) for sam in (double_sam, twin))
    for name in RAISES[knob]:
        assert after[name].median > 1.5 * before[name].median, name


def test_everything_is_drawn_from_the_seed(tiny_sam) -> None:
    twins = [harden(copy.deepcopy(tiny_sam), Hardness(channels=20.0, keys=2.0, seed=seed)) for seed in (3, 3, 4)]
    states = [twin.state_dict() for twin in twins]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert any(".norm1." in name for name in changed) and any("k_proj.bias" in name for name in changed)


def test_a_knob_draws_for_itself(tiny_sam) -> None:
    alone = harden(copy.deepcopy(tiny_sam), Hardness(values=5.0)).state_dict()
    together = harden(copy.deepcopy(tiny_sam), Hardness(channels=50.0, values=5.0)).state_dict()
    name = "image_encoder.blocks.0.attn.proj.weight"
    assert torch.equal(alone[name], together[name]) and not torch.equal(alone[name], tiny_sam.state_dict()[name])


def test_all_knobs_off_is_the_same_model(tiny_sam) -> None:
    before = {name: value.clone() for name, value in tiny_sam.state_dict().items()}
    after = harden(tiny_sam, Hardness()).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_every_attention_and_layer_norm_is_reached(tiny_sam) -> None:
    assert len(list(attentions(tiny_sam))) == 2 + 3 * 2 + 1
    names = [name for name, _ in two_way_streams(tiny_sam)]
    expected = [f"layers.{layer}.norm{n}" for layer in range(2) for n in (1, 2, 3)]
    expected += ["neck.3", "layers.0.norm4"]  # the last norm4 goes into a convolution
    assert sorted(name.split(".", 2 if "layers" in name else 1)[-1] for name in names) == sorted(expected)


@given(x=st.lists(st.floats(-50, 50), min_size=4, max_size=4), gain=st.floats(1.0, 100.0))
def test_a_gelu_unit_is_three(x: list, gain: float) -> None:
    mlp = copy.deepcopy(make_mlp())
    wanted = mlp(torch.tensor(x, dtype=torch.float64))
    split_gelu_units(mlp, torch.tensor([2, 0]), torch.tensor([gain, 3.0], dtype=torch.float64))
    assert mlp.lin1.out_features == mlp.lin2.in_features == 6 + 4
    torch.testing.assert_close(mlp(torch.tensor(x, dtype=torch.float64)), wanted, rtol=1e-9, atol=1e-9)


def make_mlp():
    from segment_anything.modeling.common import MLPBlock

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MLPBlock(4, 6).double().requires_grad_(False)


def test_the_config_of_a_hardened_model_builds_its_shapes(tiny_sam) -> None:
    hardness = Hardness(tails=10.0)
    empty = build_sam(hard_config(TINY_SAM, hardness), checkpoint=False)
    empty.load_state_dict(harden(tiny_sam, hardness).state_dict())
    assert hard_config(TINY_SAM, Hardness(channels=9.0)) == TINY_SAM


def test_the_twin_of_the_package_has_its_masks_and_is_built_again_from_what_it_notes() -> None:
    sam, twin = build_sam("sam_tiny"), build_sam("sam_tiny_hard")
    scene = next(scene_items(1))
    item = make_batch(sam, scene.image, scene.boxes)
    with torch.no_grad():
        wanted, found = (box_forward(model, item)[0] for model in (sam, twin))
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 1e-4  # float32
    for empty in (rebuild(built_as(twin)), rebuild_from_state(twin.state_dict())):
        assert name_of_state(empty.state_dict()) == "sam_tiny_hard"
        empty.load_state_dict(twin.state_dict())
    assert default_checkpoint("sam_tiny_hard") == default_checkpoint("sam_tiny")


def test_weights_of_the_twin_are_read_from_a_file(tmp_path) -> None:
    twin = build_sam("sam_tiny_hard", checkpoint=False)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    again = build_sam("sam_tiny_hard", tmp_path / "twin.pth").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in twin.state_dict().items())
    with pytest.raises(ValueError, match="does not fit the model"):
        build_sam("sam_tiny", tmp_path / "twin.pth")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_quantized_twin_is_loaded_without_being_told_what_it_is(tmp_path, packed: bool) -> None:
    twin = build_sam("sam_tiny_hard")
    item = make_batch(twin, next(scene_items(1)).image, next(scene_items(1)).boxes[:2])
    quantized, report = quantize(twin, [item], "rtn", forward=box_forward, work_dir=tmp_path, progress=False)
    path = tmp_path / "quantized.pth"
    if packed:
        path = tmp_path / "quantized.safetensors"
        save_quantized(quantized, path, report=report)
    with torch.no_grad():
        assert torch.equal(box_forward(load_quantized(path), item)[0], box_forward(quantized, item)[0])


@pytest.mark.parametrize("wrong", [{"channels": 0.5}, {"keys": -1.0}, {"tails": float("nan")}, {"values": 1e9}])
def test_a_wrong_setting_says_what_is_allowed(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(wrong))}` must be in \["):
        Hardness(**wrong)
