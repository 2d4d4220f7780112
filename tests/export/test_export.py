# SPDX-License-Identifier: Apache-2.0
"""Specs of models: what is in them, what is left out and why, the same bytes every time, errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.export import Patches, SpecError, export_spec, load_spec, make_spec, save_spec
from ahcq_plugin.export.codes import decode, encode
from ahcq_plugin.export.compare import compare
from ahcq_plugin.export.convert import activation_operand
from ahcq_plugin.export.interpret import cut_patches, golden_output, interpreted
from ahcq_plugin.functional import agq
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.hls import HLSOptions
from ahcq_plugin.hls.layout import lay_out
from ahcq_plugin.ptq import Recipe, calibrate, prepare, save_checkpoint
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES
from ahcq_plugin.zoo.sam import box_forward
from tests.export.specs import make_linear
from tests.export.test_spec_io import same

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(forward=box_forward, progress=False)


def test_every_layer_and_matmul_of_a_sam(quantized, spec):
    layers = {f"{unit.name}.{m.layer}" for unit, m in spec.matmuls() if m.layer}
    assert layers == set(weight_layers(quantized))
    assert [unit.name for unit in spec.units] == list(prepared_units(quantized))
    kinds = [m.kind for unit, m in spec.matmuls() if unit.name == "image_encoder.blocks.0"]
    assert kinds == ["linear", "qk", "av", "linear", "linear", "linear"]
    product = spec["image_encoder.blocks.2"]["matmul_1"]  # global attention: 3 heads, 32 x 32 tokens
    assert (product.batch, product.m, product.k, product.n) == (3, 1024, 1024, 64)


def test_steps_are_the_glue(spec):
    steps = {step.name: step for step in spec["image_encoder.blocks.0"].steps}
    ops = [step.op for step in steps.values()]
    assert ops[0] == "input" and ops[-1] == "output" and ops.count("matmul") == 6 and ops.count("quantize") == 8
    assert {"LayerNorm", "window_partition", "mul", "softmax", "add_decomposed_rel_pos", "GELU", "add"} < set(ops)
    assert steps["matmul"].quantizers == ("getitem_8_q_post_act_fake_quantizer", "getitem_9_k_post_act_fake_quantizer")
    assert steps[steps["attn_proj"].quantizers[0]].inputs == ("reshape_2",)
    order = list(steps)
    assert order.index("matmul") < order.index("softmax") < order.index("matmul_1") < order.index("mlp_act")


def test_weights_and_operands_are_the_quantizers_own(quantized, spec):
    for unit, matmul in spec.matmuls():
        if matmul.kind != "linear":
            continue
        layer = quantized.get_submodule(f"{unit.name}.{matmul.layer}")
        assert np.array_equal(decode(matmul.right, matmul.right.codes), layer.weight.detach().flatten(1).numpy())
        assert np.array_equal(matmul.bias, layer.bias.detach().numpy() if layer.bias is not None else 0 * matmul.bias)


def frozen_quantizer(family: str, bits: int, seed: int):
    """A frozen quantizer with random parameters."""
    quantizer = ACTIVATION_FAMILIES[family](quant_max=2**bits - 1)
    rng = np.random.default_rng(seed)
    scales = torch.from_numpy(2.0 ** rng.uniform(-6, 1, 7)).float()
    quantizer.scale.data = scales[: 2 if family == "hluq" else 1].clone()
    if family in ("uniform", "cag"):
        quantizer.zero_point.fill_(int(rng.integers(2**bits)))
    if family == "cag":
        quantizer.labels = torch.from_numpy(rng.permutation([0, 0, 1, 1, 1, 2]))
        quantizer.scale.data, quantizer.zero_point = scales[:3].clone(), torch.from_numpy(rng.integers(0, 2**bits, 3))
    if family in ("hluq", "power_of_two"):
        quantizer.offset.fill_(float(-rng.random()))
    if family == "hluq":
        quantizer.log_levels.fill_(int(rng.integers(1, min(16, 2**bits - 2) + 1)))
    if family == "lnq":
        quantizer.shape_factor.fill_(float(rng.choice([0.001, 1.0, 20.0, 200.0])))
        quantizer.finish()
    if family == "agq":
        quantizer.tau.fill_(int(rng.choice(agq.allowed_taus(bits))))
    quantizer.enable_fake_quant(True)
    return quantizer


@settings(max_examples=150)
@given(st.sampled_from(list(ACTIVATION_FAMILIES)), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_operands_give_the_codes_of_their_quantizers(family, bits, seed):
    """encode: the same codes everywhere, on boundaries and next to them; decode: the levels up to float32 rounding."""
    quantizer = frozen_quantizer(family, min(bits, 6) if family == "power_of_two" else bits, seed)
    operand = activation_operand(quantizer)
    channels = operand.channels if operand.family == "grouped" else 3
    levels = quantizer.decode(torch.arange(2**operand.bits)[:, None].expand(-1, channels)).detach()
    values = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, levels * 7, -levels])
    if operand.family in ("hluq", "table"):
        edges = torch.from_numpy(operand.boundaries)[:, None].expand(-1, channels)
        values = torch.cat([values, edges, torch.nextafter(edges, torch.tensor(-torch.inf))])
    codes = encode(operand, values.numpy())
    assert np.array_equal(codes, quantizer.encode(values).numpy())
    back, wanted = decode(operand, codes), quantizer.decode(torch.from_numpy(codes)).detach().numpy()
    if family in ("uniform", "cag", "lnq"):
        assert np.array_equal(back, wanted)
        return
    # roots of two, and powers below 2^-30, are rounded to half a unit of the table
    rounded = float(operand.unit) / 2 if operand.family == "table" and operand.table.max() == 2**30 else 0.0
    size = np.abs(wanted) + 2 * abs(float(getattr(operand, "offset", 0)))
    assert (np.abs(back - wanted) <= 3 * 2**-24 * size + rounded).all()


def test_export_is_deterministic_and_reads_back(tiny_sam, tiny_items, tmp_path):
    qmodel, _ = quantize(tiny_sam, tiny_items, "rtn", **TINY)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    export_spec(qmodel, tmp_path / "a")
    save_spec(load_spec(tmp_path / "a"), tmp_path / "b")
    export_spec(qmodel, tmp_path / "c", tiny_items[0], box_forward)
    folders = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"]
    assert folders[0] == folders[1] == folders[2]
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())
    assert all("forward" not in vars(unit) for unit in prepared_units(qmodel).values())


def test_a_vision_transformer_of_timm(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1).eval()
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qmodel, _ = quantize(model, [batch], {"name": "rtn", "cag": True, "hluq": True, "lnq": True}, progress=False)
    with pytest.raises(ValueError, match="this model is no SAM: give `batch`"):
        make_spec(qmodel)
    spec = export_spec(qmodel, tmp_path, batch)
    assert [m.kind for _, m in spec.matmuls()] == ["linear", "qk", "av", "linear", "linear", "linear"]
    assert spec.left_out == ()


class Odd(nn.Module):
    """A block with a dilated convolution, values on the left, and a q with a non-uniform quantizer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.conv, self.proj = nn.Linear(8, 24), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        out = (v.transpose(-2, -1) @ weights).transpose(-2, -1)
        return self.proj(out) + self.conv(x.transpose(-2, -1).reshape(-1, 8, 4, 4)).flatten(2).transpose(-2, -1)


def test_what_is_left_out_says_why(caplog):
    model = nn.Sequential(Odd()).eval()
    batch = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    recipe = {"name": "rtn", "families": {"q": "hluq"}}
    qmodel, _ = quantize(model, [batch], recipe, units=["0"], progress=False)
    spec = make_spec(qmodel, batch)
    assert [m.layer for m in spec["0"].matmuls] == ["qkv", "proj"]
    reasons = "\n".join(spec.left_out)
    assert "0.conv: a convolution with dilation (2, 2), not (1, 1)" in reasons
    assert "attention probabilities are its right operand" in reasons
    assert "the left operand of kind qk must be one of uniform, per_head, got hluq" in reasons
    assert "not exported: 0.conv" in caplog.text


def test_a_model_that_is_not_frozen(tiny_sam, tiny_items):
    with pytest.raises(ValueError, match="no quantized unit"):
        make_spec(tiny_sam)
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    with pytest.raises(
        SpecError, match=r"unit 'image_encoder.*, node '.*': the model is not frozen .*quantization is off"
    ):
        make_spec(tiny_sam)


def test_a_weight_off_its_grid(tiny_sam, tiny_items):
    qmodel, _ = quantize(tiny_sam, tiny_items, "rtn", **TINY)
    layer = next(iter(weight_layers(qmodel).values()))
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    with pytest.raises(SpecError, match=r"1 of \d+ weights are off their grid; freeze"):
        make_spec(qmodel)


def test_patches_are_those_of_a_convolution():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 3, 7, 6))
    weight = torch.from_numpy(rng.integers(-8, 8, (4, 3, 3, 2))).double()
    zero = 5
    rows = cut_patches(codes, Patches(3, (3, 2), (2, 1), (1, 0)), zero)
    wanted = nn.functional.conv2d(torch.from_numpy(codes - zero).double(), weight, stride=(2, 1), padding=(1, 0))
    found = torch.from_numpy(rows - zero).double() @ weight.flatten(1).T
    assert torch.equal(found.view(2, *wanted.shape[2:], 4).permute(0, 3, 1, 2), wanted)


class Convolutions(nn.Module):
    """Depthwise, in groups, and with as many outputs again, one after the other."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False)
        self.multiplied = nn.Conv2d(8, 16, 1, groups=8)

    def forward(self, x):
        return self.multiplied(self.grouped(self.depthwise(x).relu()).relu())


def test_convolutions_with_groups(tmp_path):
    torch.manual_seed(0)
    model, batch = nn.Sequential(Convolutions()).eval(), torch.randn(2, 6, 7, 5)
    qmodel, _ = quantize(model, [batch], "rtn", 4, 4, units=["0"], progress=False)
    spec = export_spec(qmodel, tmp_path, batch)
    assert spec.left_out == () and same(load_spec(tmp_path), spec)
    found = {m.layer: (m.k, m.n, m.groups, m.row_length) for _, m in spec.matmuls()}
    assert found == {"depthwise": (9, 6, 6, 54), "grouped": (18, 8, 2, 36), "multiplied": (1, 16, 8, 8)}
    layers = {m.name: qmodel.get_submodule(f"0.{m.layer}") for _, m in spec.matmuls()}

    def on_matmul(unit, call):  # torch's own convolution, on integers in float64
        matmul = spec[unit][call.site.node.name]
        layer, result = layers[matmul.name], golden_output(matmul, call)[0]
        weight = torch.from_numpy(matmul.right.signed()).double().view_as(layer.weight)
        codes = (call.left - matmul.left.zero_point).double()
        wanted = nn.functional.conv2d(codes, weight, None, layer.stride, layer.padding, 1, layer.groups)
        got = torch.from_numpy(result.accumulators[..., 0]).double()
        assert torch.equal(got.view(2, *wanted.shape[2:], -1).permute(0, 3, 1, 2), wanted)
        return call.float_output()

    with torch.no_grad(), interpreted(prepared_units(qmodel), on_matmul):
        qmodel(batch)
    rows, units = compare(qmodel, spec, [batch])
    assert all(r.golden_error <= r.golden_limit and r.torch_error <= r.torch_limit for r in rows) and len(rows) == 3
    assert units[0].differing == 0
    with pytest.raises(SpecError, match="'depthwise' is a convolution with 6 groups: no kernel computes those"):
        lay_out(spec["0"]["depthwise"], HLSOptions())


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="`groups` must divide the 6 channels, got 4"):
        Patches(6, (1, 1), (1, 1), (0, 0), 4)
    matmul = make_linear("uniform", 4, 6, 3, np.random.default_rng(0))
    with pytest.raises(SpecError, match="`patches` make rows of 6 in 2 groups, `k` is 6"):
        dataclasses.replace(matmul, patches=Patches(6, (1, 1), (1, 1), (0, 0), 2))
    with pytest.raises(SpecError, match="`groups` must divide the 3 outputs, got 2"):
        dataclasses.replace(matmul, patches=Patches(12, (1, 1), (1, 1), (0, 0), 2))


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_tool(quantized, spec, tmp_path):
    save_checkpoint(tmp_path / "quantized.pth", quantized, Recipe.from_config("ahcq"))
    done = run_tool(tmp_path / "quantized.pth", "-o", tmp_path / "spec")
    assert done.returncode == 0, done.stderr
    save_spec(spec, tmp_path / "wanted")
    found, wanted = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("spec", "wanted"))
    assert found == wanted
    assert len(done.stdout.splitlines()) == 1 + len(list(spec.matmuls())) + 1
    (tmp_path / "quantized.pth").write_bytes(b"junk")
    failed = run_tool(tmp_path / "quantized.pth", "-o", tmp_path / "other")
    assert failed.returncode == 2 and "cannot be read" in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "other").exists()
