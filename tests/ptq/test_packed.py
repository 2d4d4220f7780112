# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints: what is read is the model that was saved, at the size of its bits; damage gets a clear error."""

from __future__ import annotations

import hashlib
import json
import random
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.functional import uniform
from ahcq_plugin.graph import describe, prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, freeze, packed, prepare, read_checkpoint, save_checkpoint, save_packed
from ahcq_plugin.ptq.freeze import unfrozen
from ahcq_plugin.ptq.prepared import quantizers, weight_layers
from ahcq_plugin.zoo.sam import box_forward, build_sam
from ahcq_plugin.zoo.track import clip_forward
from tests.conftest import computing_state, make_clips, make_sam2, make_tiny_items, make_tiny_sam

RECIPES = {
    "w3a8": {"name": "rtn", "w_bits": 3, "a_bits": 8, "agq": True},
    "w2a4": {"name": "rtn", "w_bits": 2, "families": {"post_act": "power_of_two", "q": "cag"}},
}


def frozen(recipe="rtn"):
    model, report = quantize(make_tiny_sam(), make_tiny_items()[:1], recipe, forward=box_forward, progress=False)
    return model, report


def rounded(model, bits):
    """``model``, prepared and frozen: weights to nearest between the ends of their row, activations not calibrated."""
    prepare(model, Recipe.from_config("rtn", w_bits=bits))
    for layer in weight_layers(model).values():
        rows, quantizer = layer.weight.detach().flatten(1), layer.weight_fake_quant
        params = uniform.qparams_from_range(rows.amin(1), rows.amax(1), bits)
        quantizer.scale, quantizer.zero_point = params.scale, params.zero_point
    return freeze(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, model, report) of a small SAM in 4 bits, as it was written; not to be changed."""
    path = tmp_path_factory.mktemp("packed") / "quantized.safetensors"
    model, report = frozen({"name": "rtn", "cag": True, "hluq": True, "lnq": True})
    save_quantized(model, path, report=report, notes={"ids": (1, 2)})
    return path, model, report


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


def assert_equal_state(model, wanted):
    """Names, their order, types and every bit of all that it computes with; and it is frozen too."""
    assert list(model.state_dict()) == list(wanted.state_dict())
    assert not [name for name, quantizer in quantizers(model) if unfrozen(quantizer)]
    found, wanted = model.state_dict(), computing_state(wanted)
    wrong = [
        k for k, v in wanted.items() if found[k].dtype != v.dtype or not torch.equal(bits_of(found[k]), bits_of(v))
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_family_and_width_comes_back_bit_for_bit(recipe, tmp_path):
    model, report = frozen(recipe)
    save_quantized(model, tmp_path / "q.safetensors", report=report)
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert_equal_state(loaded, model)
    with torch.no_grad():
        for a, b in zip(*(box_forward(m, make_tiny_items()[2]) for m in (loaded, model)), strict=True):
            assert torch.equal(a, b)


def test_the_file_says_everything(saved):
    path, model, report = saved
    checkpoint = read_checkpoint(path)
    assert checkpoint.recipe == report.recipe and checkpoint.units == list(prepared_units(model))
    assert checkpoint.extra["notes"] == {"ids": [1, 2]}
    wanted = {key: value for key, value in report.to_dict().items() if key not in ("roles", "recipe")}
    assert checkpoint.extra["report"] == json.loads(json.dumps(wanted))
    assert describe(load_quantized(path)) == report.roles
    assert checkpoint.built["builder"] == "sam" and checkpoint.built["config"]["embed_dim"] == 32
    fresh = make_tiny_sam()
    assert load_quantized(path, lambda state: fresh if "image_encoder.pos_embed" in state else None) is fresh


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_weights(bits, tmp_path):
    model = rounded(make_tiny_sam(), bits)
    save_quantized(model, tmp_path / "q.safetensors")
    assert_equal_state(load_quantized(tmp_path / "q.safetensors"), model)


@pytest.mark.slow
def test_sam_b_in_four_bits(tmp_path):
    """With floats outside of the units in float32 and in float16."""
    model = rounded(build_sam("vit_b", checkpoint=False), 4)
    for outside, most in (("float32", 66_000_000), ("float16", 55_000_000)):
        save_quantized(model, tmp_path / outside, outside)
        assert (tmp_path / outside).stat().st_size <= most
    assert_equal_state(load_quantized(tmp_path / "float32"), model)


def test_weights_take_their_bits(tmp_path):
    """Of the packaged SAM: four bits a weight, four bytes a float outside of the units, little else."""
    model = rounded(build_sam("sam_tiny"), 4)
    sizes = {}
    for outside in packed.OUTSIDE:
        save_quantized(model, tmp_path / "q.safetensors", outside)
        sizes[outside] = (tmp_path / "q.safetensors").stat().st_size
    units = tuple(prepared_units(model))
    weights = {id(layer.weight): layer.weight.numel() for layer in weight_layers(model).values()}
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(units))
    least = sum(weights.values()) // 2 + 4 * outside
    assert least < sizes["float32"] < least + 500_000
    assert abs(sizes["float32"] - sizes["float16"] - 2 * outside) < 5000
    assert sizes["float16"] < 0.5 * 2 * sum(p.numel() for p in model.parameters()), "less than half of FP16 weights"


def test_float16_outside_rounds_that_and_nothing_else(saved, tmp_path):
    _, model, _ = saved
    save_quantized(model, tmp_path / "half.safetensors", "float16")
    loaded = load_quantized(tmp_path / "half.safetensors").state_dict()
    units = tuple(f"{name}." for name in prepared_units(model))
    rounded = 0
    for name, value in computing_state(model).items():
        outside = not name.startswith(units) and value.dtype == torch.float32 and value.numel() > 1
        rounded += outside and not torch.equal(value, value.half().float())
        assert torch.equal(loaded[name], value.half().float() if outside else value), name
    assert rounded > 10


def test_equal_models_give_equal_bytes_and_names_do_not_matter(saved, tmp_path):
    path, model, report = saved
    save_quantized(load_quantized(path), tmp_path / "again.pth", report=report, notes={"ids": [1, 2]})
    assert (tmp_path / "again.pth").read_bytes() == path.read_bytes()
    assert_equal_state(load_quantized(tmp_path / "again.pth"), model)
    save_checkpoint(tmp_path / "q.safetensors", model, report.recipe)
    assert_equal_state(load_quantized(tmp_path / "q.safetensors", lambda _: make_tiny_sam()), model)


def test_a_sam2_is_built_from_the_file_alone(tmp_path):
    pytest.importorskip("sam2")
    clips = make_clips(1)
    model = prepare(make_sam2(), Recipe.from_config("rtn"))
    calibrate(model, clips, clip_forward, progress=False)
    freeze(model)
    save_quantized(model, tmp_path / "q.safetensors")
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert_equal_state(loaded, model)
    assert torch.equal(clip_forward(loaded, clips[0]), clip_forward(model, clips[0]))


def test_without_a_name_the_shapes_say_which_sam2(tmp_path):
    sam2 = pytest.importorskip("ahcq_plugin.zoo.sam2")
    for name in ("sam2_tiny", "sam2_t", "sam2.1_s"):
        assert sam2.name_of_state(sam2.build_sam2(name, checkpoint=False).state_dict()) == name
    with pytest.raises(ValueError, match=r"none of sam2_tiny, sam2_t.*: \(width, blocks\) is \(16, 5\)"):
        sam2.name_of_state(make_sam2().state_dict())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.linear2(self.linear1(x).relu())


class Twice(nn.Module):
    """One block that is reached by two names, as models with shared layers have it."""

    def __init__(self):
        super().__init__()
        block = Block()
        self.blocks, self.head = nn.ModuleList([block, block]), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_block_of_two_names_is_stored_once(tmp_path):
    def build(_=None):
        torch.manual_seed(0)
        return Twice().eval()

    batch = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    model, _ = quantize(build(), [batch], "rtn", units=["blocks.0"], progress=False)
    save_quantized(model, tmp_path / "q.safetensors")
    head = json.loads(safetensors.safe_open(tmp_path / "q.safetensors", "pt").metadata()["ahcq_plugin"])
    assert head["model"] is None and head["state"]["blocks.1.linear1.weight"] == {"same": "blocks.0.linear1.weight"}
    loaded = load_quantized(tmp_path / "q.safetensors", build)
    assert_equal_state(loaded, model)
    assert loaded.blocks[0] is loaded.blocks[1] and torch.equal(loaded(batch), model(batch))
    with pytest.raises(ValueError, match=r"q.safetensors: these weights belong to none of .*; give `build`"):
        load_quantized(tmp_path / "q.safetensors")


def test_a_model_that_is_not_frozen_is_refused(saved, tmp_path):
    path = tmp_path / "q.safetensors"
    with pytest.raises(ValueError, match="a prepared model has units of one recipe"):
        save_quantized(make_tiny_sam(), path)
    model = prepare(make_tiny_sam(), Recipe.from_config("rtn"))
    with pytest.raises(ValueError, match="the model is not frozen, first .*: quantization is off; save what"):
        save_quantized(model, path)
    model = load_quantized(saved[0])
    with torch.no_grad():
        model.image_encoder.blocks[1].mlp.lin2.weight[3, 5] *= 1.0000002
    with pytest.raises(
        ValueError, match="1 of 2048 weights of image_encoder.blocks.1.mlp.lin2 are not what their codes"
    ):
        save_quantized(model, path)
    model = load_quantized(saved[0])
    model.image_encoder.pos_embed.data[0, 0, 0, 0] = 7e4
    with pytest.raises(ValueError, match="pos_embed has values that float16 cannot hold .* use outside='float32'"):
        save_quantized(model, path, "float16")
    with pytest.raises(ValueError, match="`outside` must be one of float32, float16, got 'int8'"):
        save_quantized(model, path, "int8")
    assert not path.exists()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, the file cut or prolonged, parts exchanged."""
    data, kind = bytearray(data), rng.randrange(6)
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(2000)
    if kind <= 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + 20] = rng.randbytes(20)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data += rng.randbytes(rng.randrange(1, 9))
    else:
        data[at : at + 8], data[-8:] = data[-8:], data[at : at + 8]
    return bytes(data)


def test_damage_is_found_or_does_nothing(saved, tmp_path):
    path, model, _ = saved
    data, rng = path.read_bytes(), random.Random(0)
    wanted = read_checkpoint(path).state
    assert wanted.keys() == computing_state(model).keys()
    files = [data[:n] for n in (0, 1, 8, 9, 20)] + [damaged(data, rng) for _ in range(60)]
    for number, content in enumerate(files):
        (tmp_path / "q").write_bytes(content)
        if content == data:
            continue
        refusal = f"^checkpoint {tmp_path / 'q'} (cannot be read|is refused: it is a bare)|^{tmp_path / 'q'} is not a"
        with pytest.raises(ValueError, match=refusal) as caught:
            read_checkpoint(tmp_path / "q")
        assert "\n" not in str(caught.value), number
    shutil.copy(path, tmp_path / "q")
    assert all(torch.equal(v, wanted[k]) for k, v in read_checkpoint(tmp_path / "q").state.items())


def forge(path, target, change):
    """Write a file like ``path`` with a right digest but other content: ``change(head, tensors)``."""
    tensors = safetensors.torch.load_file(path)
    head = json.loads(safetensors.safe_open(path, "pt").metadata()["ahcq_plugin"])
    change(head, tensors)
    head["sha256"] = "0" * 64
    data = bytearray(safetensors.torch.save(tensors, {"ahcq_plugin": json.dumps(head)}))
    start = data.index(b"0" * 64)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    target.write_bytes(data)


QKV = "image_encoder.blocks.0.attn.qkv"
CODES = f"{QKV}.weight_fake_quant.codes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format="ahcq_plugin.packed/7"), "format 'ahcq_plugin.packed/7', this version"),
        (lambda h, t: h.pop("units"), r"missing keys \['units'\], unknown keys \[\]"),
        (lambda h, t: h.update(more=1), r"missing keys \[\], unknown keys \['more'\]"),
        (lambda h, t: h["recipe"].update(w_bits=9), r"`w_bits` must be in \[2, 8\], got 9"),
        (lambda h, t: h.update(recipe=[1]), r"`recipe` must be of type dict, got \[1\]"),
        (lambda h, t: h.update(units=5), "`units` must be of type list, got 5"),
        (lambda h, t: h["state"][f"{QKV}.weight"].update(shape=[]), "cannot be read"),
        (lambda h, t: h["state"][f"{QKV}.weight"].update(codes=[]), "has codes of 0 rows"),
        (lambda h, t: t.pop(CODES), f"nothing under '{CODES}'"),
        (lambda h, t: t.update({CODES: t[CODES][:-1]}), r"3168 codes of 4 bits take 1584 bytes .* got uint8 \(1583,\)"),
        (lambda h, t: t.update(other=torch.zeros(2)), "does not fit this model: .*other is not in the model"),
        (lambda h, t: h["state"][f"{QKV}.weight"]["codes"][0].__setitem__(3, 5), "3168 codes of 5 bits take 1980"),
        (lambda h, t: h["state"][f"{QKV}.weight"].update(shape=[95, 32]), "shape .95, 32. has codes of 96 rows"),
        (lambda h, t: h["state"][f"{QKV}.weight"]["codes"][0].__setitem__(1, 1), "rows 1 to 96 of 4 bits"),
        (lambda h, t: h["state"].update({"a.b": "float32"}), "nothing under 'a.b'"),
        (lambda h, t: h["state"].__setitem__(f"{QKV}.bias", "float99"), "unknown dtype 'float99'; allowed: float16"),
        (lambda h, t: h["state"].__setitem__("x", {"same": "y"}), "nothing under 'y'"),
        (lambda h, t: h["state"].__setitem__("x", ["uint8", [3], 1]), r"one number of shape \[3\] cannot be 1"),
        (lambda h, t: h["state"].__setitem__("x", 5), "cannot be read"),
        (lambda h, t: h["state"].pop(f"{QKV}.weight"), f"it holds codes that no weight uses: {CODES}"),
        (lambda h, t: h.update(state=[]), "`state` must be of type dict"),
        (lambda h, t: h.update(model={"builder": "os"}), r"has a `builder` \(sam, sam2\).*give `build`"),
        (lambda h, t: h["model"]["config"].update(depth=3), "does not fit this model"),
        (lambda h, t: h["model"]["config"].pop("depth"), r"missing keys \['depth'\].*give `build`"),
    ],
)  # fmt: skip
def test_content_that_cannot_be_right_is_refused(saved, tmp_path, change, message):
    forge(saved[0], tmp_path / "q", change)
    with pytest.raises(ValueError, match=f"{tmp_path / 'q'}.*(?:{message})") as caught:
        load_quantized(tmp_path / "q")
    assert "\n" not in str(caught.value)


def test_a_forged_file_without_a_change_is_read(saved, tmp_path):
    forge(saved[0], tmp_path / "q", lambda head, tensors: None)
    assert_equal_state(load_quantized(tmp_path / "q"), saved[1])


def test_numbers_that_are_not_finite_are_kept_as_none(saved, tmp_path):
    save_packed(tmp_path / "q", saved[1], {"condition": float("inf"), "of": [float("nan"), 1.5]})
    assert read_checkpoint(tmp_path / "q").extra == {"condition": None, "of": [None, 1.5]}
