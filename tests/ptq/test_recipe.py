# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.graph import ROLES
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.recipe import current_names
from ahcq_plugin.quantizers import OutputErrorObserver
from ahcq_plugin.support.digest import digest
from tests.robustness.kinds import VALUES


@given(st.sampled_from(Recipe.names()), st.integers(2, 8), st.integers(2, 8), st.integers(1, 20000))
def test_round_trips_through_plain_values(name, w_bits, a_bits, iterations):
    recipe = Recipe.from_config({"name": name, "w_bits": w_bits}, a_bits=a_bits, iterations=iterations)
    assert Recipe.from_config(recipe.to_dict()) == recipe
    assert Recipe.from_config(recipe) == recipe


def test_names_differ_only_in_method():
    qdrop, brecq = Recipe.from_config("qdrop"), Recipe.from_config("brecq")
    assert qdrop.iterations == brecq.iterations == 20000
    assert qdrop.keep_probability == qdrop.input_mix == 0.5 and qdrop.learn_scales
    assert not brecq.learn_scales and not brecq.quantize_activations
    assert Recipe.from_config("rtn").granularity == "none" and Recipe.from_config("adaround").granularity == "layer"


def test_integers_are_taken_for_floats():
    assert Recipe.from_config({"name": "qdrop", "warmup": 0}).warmup == 0.0


def test_who_searches_ranges():
    """PTQ4SAM: the keys alone. ``range_by_output_error``: all uniform, and HLUQ; groups and softmax always do."""

    def options(**keys):
        recipe = Recipe.from_config("ahcq", **keys)
        found = {role: recipe.quantizer_options(role) for role in ROLES}
        return {role: {k: v for k, v in o.items() if k != "groups"} for role, o in found.items()}

    assert not any(options().values())
    assert {role for role, found in options(big=True).items() if found} == {"k"}
    searched = options(range_by_output_error=True, big=True)
    assert searched.pop("post_act") == {"search_range": True}
    own = {role: searched.pop(role) for role in ("qkv_in", "mlp_in", "gated_act", "softmax")}
    assert not any(own.values()) and all(found == {"observer": OutputErrorObserver} for found in searched.values())


def test_a_component_may_be_kept_to_some_units():
    """The paper's LNQ: everywhere in SAM, in SAM 2 in the image encoder only."""
    recipe = Recipe.from_config("ahcq")
    for unit in (
        "image_encoder.blocks.0",
        "mask_decoder.transformer.layers.0",
        "image_encoder.trunk.blocks.0",
        "",
        "blocks.1",
    ):
        assert recipe.family("softmax", unit) == "lnq"
    for unit in ("memory_attention.layers.3", "sam_mask_decoder.transformer.final_attn_token_to_image"):
        assert recipe.family("softmax", unit) == "uniform"
        assert recipe.family("post_act", unit) == "hluq" and recipe.family("qkv_in", unit) == "cag"
        assert Recipe.from_config("ptq4sam").family("softmax", unit) == "agq"
        assert Recipe.from_config("ahcq", without={}).family("softmax", unit) == "lnq"
        assert Recipe.from_config("ahcq", families={"softmax": "agq"}).family("softmax", unit) == "agq"
    other = Recipe.from_config("ahcq", without={"cag": ("image_encoder.*",)}, range_by_output_error=True)
    assert other.family("mlp_in", "image_encoder.blocks.0") == "uniform" and other.family("mlp_in") == "cag"
    assert "observer" in other.quantizer_options("mlp_in", "image_encoder.blocks.0")
    assert other.quantizer_options("mlp_in") == {"groups": 4}
    assert Recipe.from_config(other.to_dict()) == other


@pytest.mark.parametrize(
    "config, message",
    [
        ("gptq", r"unknown recipe 'gptq'; allowed: rtn, adaround, brecq, qdrop"),
        ({}, r"unknown recipe None; allowed: "),
        ({"name": "rtn", "wbits": 4}, r"recipe: unknown key 'wbits'; allowed: .*w_bits"),
        ({"name": "rtn", "w_bits": 9}, r"recipe: `w_bits` must be in \[2, 8\], got 9"),
        ({"name": "rtn", "a_bits": 1}, r"recipe: `a_bits` must be in \[2, 8\], got 1"),
        ({"name": "rtn", "a_bits": 4.0}, r"recipe: `a_bits` must be of type int, got 4.0"),
        ({"name": "rtn", "w_bits": True}, r"recipe: `w_bits` must be of type int, got True"),
        ({"name": "qdrop", "iterations": 0}, r"recipe: `iterations` must be in \[1, 10000000\], got 0"),
        ({"name": "qdrop", "iterations": 10**9}, r"`iterations` must be in \[1, 10000000\], got 1000000000"),
        ({"name": "qdrop", "scale_lr": float("inf")}, r"recipe: `scale_lr` must be finite, got inf"),
        ({"name": "qdrop", "exponent_end": 30.0}, r"falls from `exponent_start` to `exponent_end`, got 20.0 and 30.0"),
        ({"name": "rtn", "seed": -1}, r"recipe: `seed` must be in \[0, 4294967295\], got -1"),
        ({"name": "qdrop", "warmup": 1.5}, r"recipe: `warmup` must be in \[0, 1\], got 1.5"),
        ({"name": "qdrop", "scale_lr": 0}, r"recipe: `scale_lr` must be positive, got 0"),
        ({"name": "qdrop", "scale_lr": 1e30}, r"recipe: `scale_lr` must be at most 1e\+06, got 1e\+30"),
        ({"name": "qdrop", "cache_device": "tape"}, r"`cache_device` must be one of cpu, cuda, disk, got 'tape'"),
        ({"name": "rtn", "families": {"softmx": "uniform"}}, r"`families` has 'softmx'; allowed: .*softmax"),
        ({"name": "rtn", "families": {"softmax": "lgn"}}, r"`families` has 'lgn'; allowed: uniform"),
        ({"name": "rtn", "families": 3}, r"recipe: `families` must be of type Mapping\[str, str\], got 3"),
        ({"name": "ahcq", "without": {"big": ["a"]}}, r"`without` has 'big'; allowed: cag, hluq, lnq, agq"),
        ({"name": "rtn", "families": {"softmax": ["lnq"]}}, r"`families` has \['lnq'\]; allowed: uniform"),
        ({"name": "ahcq", "without": {"lnq": None}}, r"`without.lnq` must be a list of globs of units, got None"),
        ({"name": "ahcq", "without": {"lnq": "a.*"}}, r"`without.lnq` must be a list of globs of units, got 'a.\*'"),
        ({"name": "ahcq", "without": ["lnq"]}, r"`without` must be of type Mapping\[str, Sequence\[str\]\], got"),
        ({"name": "qdrop", "granularity": "model"}, r"`granularity` must be one of none, layer, unit, got 'model'"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_config(config)
    assert "\n" not in str(caught.value)


def test_a_former_name_is_taken_with_a_warning():
    wanted = Recipe.from_config("ahcq", range_by_output_error=True)
    with pytest.warns(FutureWarning, match="`range_search` is called `range_by_output_error` now"):
        assert Recipe.from_config({"name": "ahcq", "range_search": True}) == wanted
    with pytest.warns(FutureWarning):
        assert Recipe.from_config(Recipe.from_config("ahcq"), range_search=True) == wanted
    with pytest.raises(ValueError, match="`range_search` is the former name of `range_by_output_error`; give"):
        current_names({"range_search": True, "range_by_output_error": True})


#: Keys that came after the digest below was made, and their values that do nothing.
LATER = {
    **{"rotate": False, "refit": 0.0, "tune_steps": 0, "tune_lr": 1e-3, "tune_scale_lr": 1e-3},
    **{"quantize_positions": False, "pcc": False, "par": False, "per_head": False},
    **{"center": False, "center_norms": False, "tune_weight_lr": 0.0, "tune_units": []},
    **{"tune_feature_steps": 0, "tune_feature_units": []},
}


def test_hashes_of_earlier_results_stay_valid():
    """Keys of interrupted runs and of published figures, made when the key was called ``range_search``."""
    recipe = Recipe.from_config("ahcq", range_by_output_error=True)
    former = {**recipe.to_dict(), "range_search": True}
    for key in ("range_by_output_error", *LATER):
        del former[key]
    assert recipe.to_hash() == former and {**current_names(former), **LATER} == recipe.to_dict()
    assert digest(recipe.to_hash()) == "938efbfadddd6885d0a7f693675c5f52f36914361c1f74bc826f858e25444deb"


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_no_key_takes_a_value_of_another_type(field) -> None:
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    for text in VALUES[kinds.get(field.type, dict)]:
        value = eval(text, {"float": float})
        with pytest.raises(ValueError, match=r"^(recipe|unknown recipe)") as caught:
            Recipe.from_config({"name": "qdrop", field.name: value})
        assert "\n" not in str(caught.value)


def test_more_groups_than_channels_are_refused(tiny_sam) -> None:
    before = set(dict(tiny_sam.named_modules()))
    with pytest.raises(
        ValueError, match=r"`cag_groups` is 99, what image_encoder\.blocks\.0\..* quantizes has \d+ channels"
    ):
        prepare(tiny_sam, Recipe.from_config("ahcq", cag_groups=99))
    assert set(dict(tiny_sam.named_modules())) == before


def test_without_names_units_that_are_there(tiny_sam) -> None:
    """A preset may name parts of another model; what a user adds and matches nothing is a slip."""
    recipe = Recipe.from_config("ahcq")
    assert recipe.without["lnq"]
    typo = dataclasses.replace(recipe, without={"lnq": [*recipe.without["lnq"], "image_encoder.block.*"]})
    with pytest.raises(ValueError, match=r"`without.lnq` has 'image_encoder.block.\*', which matches none of the"):
        prepare(tiny_sam, typo)
    prepare(tiny_sam, recipe)


def test_a_cache_on_a_gpu_needs_one(monkeypatch) -> None:
    recipe = Recipe.from_config("qdrop", cache_device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="this machine has no GPU: use 'cpu' or 'disk'"):
        recipe.check_machine()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    recipe.check_machine()


SWITCHED = [
    *[("rotate", True), ("refit", 0.03), ("tune_steps", 10), ("quantize_positions", True)],
    *[("pcc", True), ("par", True), ("per_head", True)],
]


@pytest.mark.parametrize("key, value", SWITCHED)
def test_what_came_later_counts_in_a_hash_where_it_does_something(key, value):
    plain, other = Recipe.from_config("qdrop"), Recipe.from_config("qdrop", **{key: value})
    assert digest(plain.to_hash()) != digest(other.to_hash()) and other.to_hash()[key] == value
