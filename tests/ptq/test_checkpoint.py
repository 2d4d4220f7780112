# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch
from torch import nn

from ahcq_plugin import load_quantized, quantize
from ahcq_plugin.ptq import Recipe, prepare, read_checkpoint, save_checkpoint
from ahcq_plugin.ptq import checkpoint as module
from ahcq_plugin.ptq.checkpoint import CALIBRATED_FILE
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.conftest import make_tiny_sam


@pytest.fixture
def saved(tiny_sam, tiny_items, tmp_path):
    model, _ = quantize(tiny_sam, tiny_items, "rtn", forward=box_forward, work_dir=tmp_path, progress=False)
    return tmp_path / "quantized.pth", model


def test_loads_into_a_freshly_built_model(saved, tiny_items):
    path, model = saved
    torch.load(path, weights_only=True)
    fresh = make_tiny_sam()
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    assert load_quantized(path, lambda _: fresh) is fresh
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    with torch.no_grad():
        for item in tiny_items:
            for a, b in zip(box_forward(fresh, item), box_forward(model, item), strict=True):
                assert torch.equal(a, b)


def under_former_names(recipe):
    return {"range_search" if key == "range_by_output_error" else key: value for key, value in recipe.items()}


def test_a_checkpoint_with_a_former_key_loads_without_a_word(saved, recwarn):
    path, model = saved
    content = safe_load(path)
    content["recipe"] = under_former_names(content["recipe"])
    save_checked(content, path)
    fresh = load_quantized(path, lambda state: make_tiny_sam())
    assert not [warning for warning in recwarn if "range_search" in str(warning.message)]
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_run_that_began_under_former_keys_goes_on(tiny_items, tmp_path):
    recipe = Recipe.from_config("qdrop", range_by_output_error=True, iterations=1)
    options = dict(forward=box_forward, work_dir=tmp_path, progress=False)
    first, _ = quantize(make_tiny_sam(), tiny_items, recipe, **options)
    content = safe_load(tmp_path / CALIBRATED_FILE)
    content["recipe"] = under_former_names(content["recipe"])
    save_checked(content, tmp_path / CALIBRATED_FILE)
    again, _ = quantize(make_tiny_sam(), tiny_items, recipe, resume=True, **options)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in first.state_dict().items())
    with pytest.raises(ValueError, match=r"the recipe changed \(seed\)"):
        quantize(make_tiny_sam(), tiny_items, recipe, resume=True, seed=1, **options)


def test_fp_keys_stay_where_they_were(tiny_sam):
    before = tiny_sam.state_dict()
    prepare(tiny_sam, Recipe.from_config("rtn"))
    after = tiny_sam.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_errors(saved, tmp_path):
    path, model = saved
    with pytest.raises(FileNotFoundError, match="checkpoint not found: .*nothing.pth"):
        load_quantized(tmp_path / "nothing.pth", lambda _: make_tiny_sam())
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated.pth cannot be read"):
        load_quantized(truncated, lambda _: make_tiny_sam())
    save_checked({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="format None, expected 'ahcq_plugin.checkpoint/1'"):
        load_quantized(tmp_path / "other.pth", lambda _: make_tiny_sam())
    content = safe_load(path)
    key = next(k for k in content["state_dict"] if k.endswith("lin1.weight"))
    content["state_dict"][key] = content["state_dict"][key][:, :-1]
    save_checked(content, tmp_path / "shape.pth")
    with pytest.raises(
        ValueError, match="does not fit this model: 1 of .*first: .*lin1.weight has shape .*, the model"
    ) as caught:
        load_quantized(tmp_path / "shape.pth", lambda _: make_tiny_sam())
    assert "\n" not in str(caught.value)


def test_the_file_is_read_once_and_says_which_model_it_is_of(saved, monkeypatch):
    path, model = saved
    read, given = [], []
    monkeypatch.setattr(module, "safe_load", lambda path: read.append(path) or safe_load(path))

    def build(state):
        given.append(state)
        return make_tiny_sam()

    load_quantized(path, build)
    assert read == [path] and list(given[0]) == list(model.state_dict())
    with pytest.raises(
        ValueError, match="quantized.pth: these weights belong to none of sam_tiny, vit_b.*; give `build`"
    ):
        load_quantized(path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.recipe.name == "rtn" and "image_encoder.blocks.0" in checkpoint.units
    assert set(checkpoint.extra) == {"report", "notes"}


def test_without_a_builder_the_zoo_builds_the_sam(tmp_path):
    sam, recipe = build_sam("sam_tiny"), Recipe.from_config("rtn")
    save_checkpoint(tmp_path / "quantized.pth", prepare(sam, recipe), recipe)
    loaded = load_quantized(tmp_path / "quantized.pth")
    assert all(torch.equal(value, sam.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_checked({"a": 1}, path)
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checked({"a": 2}, path)
    assert safe_load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_extra_is_kept(saved, tmp_path):
    _, model = saved
    save_checkpoint(tmp_path / "extra.pth", model, Recipe.from_config("rtn"), {"ids": [1, 2]})
    assert safe_load(tmp_path / "extra.pth")["extra"] == {"ids": [1, 2]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recipe", None, "its `recipe` is None"),
        ("units", "blocks", "its `units` is 'blocks'"),
        ("units", [1], r"its `units` are \[1\], expected names"),
        ("units", [], "it has no units"),
        ("leave", 5, "its `leave` is 5"),
        ("calls", [], r"its `calls` is \[\]"),
        ("state_dict", [], r"its `state_dict` is \[\]"),
        ("extra", "x", "its `extra` is 'x'"),
    ],
)
def test_a_whole_file_whose_content_cannot_be_right(key, value, message, tmp_path):
    content = {"format": module.FORMAT, "recipe": Recipe.from_config("rtn").to_dict(), "units": ["0"], "leave": []}
    content |= {"calls": {}, "state_dict": {}, "extra": {}}
    save_checked({k: v for k, v in (content | {key: value}).items() if v is not None}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth cannot be read: {message}"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: not key.endswith("scale"), None),
        (lambda key: key.endswith("lin1.weight_fake_quant.scale"), "the scale of .* is not above 0"),
        (lambda key: key.endswith("qkv.bias"), "holds NaN or infinite values"),
    ],
)
def test_values_of_a_whole_file_that_cannot_be_right(saved, change, message):
    path, _ = saved
    content = safe_load(path)
    for key in [key for key in content["state_dict"] if message and change(key)]:
        value = content["state_dict"][key]
        content["state_dict"][key] = torch.full_like(value, 0.0 if key.endswith("scale") else float("nan"))
    save_checked(content, path)
    if message is None:
        load_quantized(path, lambda _: make_tiny_sam())
    else:
        with pytest.raises(ValueError, match=message):
            load_quantized(path, lambda _: make_tiny_sam())


def test_a_model_of_another_precision_is_refused(saved):
    with pytest.raises(ValueError, match="in torch.float32, this model in torch.float16: build it so"):
        load_quantized(saved[0], lambda _: make_tiny_sam().half())
