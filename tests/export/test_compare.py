# SPDX-License-Identifier: Apache-2.0
"""The golden model against PyTorch's fake-quantized model, on images."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.export import SpecError, load_spec, make_spec, save_spec
from ahcq_plugin.export.compare import check_of_model, compare, golden_forward, mask_overlap
from ahcq_plugin.export.interpret import golden_output, interpreted
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import activation_quantizers, watched
from ahcq_plugin.zoo.sam import box_forward


def check_rows(rows):
    assert all(row.outputs for row in rows)
    wrong = [r for r in rows if r.golden_error > r.golden_limit or r.torch_error > r.torch_limit]
    assert wrong == []


def test_every_matmul_equals_pytorch_up_to_float_rounding(quantized, spec, scenes):
    assert spec.left_out == ()
    assert {(m.kind, m.left.family) for _, m in spec.matmuls()} == {
        ("linear", "uniform"),
        ("linear", "grouped"),
        ("linear", "hluq"),
        ("qk", "uniform"),
        ("av", "table"),
    }
    rows, units = compare(quantized, spec, scenes, box_forward)
    check_rows(rows)
    assert sum(unit.differing for unit in units) <= 0.001 * sum(unit.codes for unit in units)


def test_a_spec_of_other_units_is_of_another_model(quantized, spec):
    check_of_model(quantized, spec)
    first, *rest = spec.units
    for units, message in (
        (rest, rf"'{first.name}' is a unit of one of them alone"),
        ((dataclasses.replace(first, name="no.such"), *rest), "is a unit of one of them alone"),
        ((dataclasses.replace(rest[-1], name=first.name), *rest), rf"unit '{first.name}' has no matmul"),
    ):
        with pytest.raises(SpecError, match=f"the spec is of another model: .*{message}"):
            check_of_model(quantized, dataclasses.replace(spec, units=tuple(units)))
    check_of_model(quantized, dataclasses.replace(spec, units=tuple(rest), left_out=(f"{first.name}: no data",)))


def changed(matmul):
    """``matmul`` with one constant of each operand a little wrong, one at a time."""
    left, right = matmul.left, matmul.right
    if matmul.kind == "linear":
        codes = right.codes.copy()
        codes[:, 0] ^= 1
        yield {"right": dataclasses.replace(right, codes=codes)}
        yield {"right": dataclasses.replace(right, scales=right.scales * np.float32(1.00001))}
        yield {"bias": matmul.bias + np.float32(1e-4)}
    else:
        yield {"right": dataclasses.replace(right, zero_point=right.zero_point ^ 1)}
    if left.family == "grouped":
        yield {"left": dataclasses.replace(left, permutation=np.roll(left.permutation, 1))}
        yield {"left": dataclasses.replace(left, zero_points=left.zero_points ^ 1)}
    elif left.family == "hluq":
        yield {"left": dataclasses.replace(left, log_levels=left.log_levels + 1)}
        yield {"left": dataclasses.replace(left, offset=left.offset * np.float32(1.001))}
    elif left.family == "table":
        yield {"left": dataclasses.replace(left, table=left.table + (left.table > 0))}
    else:
        yield {"left": dataclasses.replace(left, scale=left.scale * np.float32(1.00001))}


def test_a_wrong_constant_is_noticed(quantized, spec, scenes):
    """What compare measures is above its limits as soon as one constant is wrong, and for that matmul only."""
    unit = spec.units[0]
    for matmul in unit.matmuls:
        for wrong in changed(matmul):
            matmuls = tuple(
                dataclasses.replace(m, accumulator_bits=40, **wrong) if m is matmul else m for m in unit.matmuls
            )
            planted = dataclasses.replace(spec, units=(dataclasses.replace(unit, matmuls=matmuls),))
            rows, _ = compare(quantized, planted, scenes[:1], quantized_encoder)
            assert [r.matmul.name for r in rows if r.golden_error > r.golden_limit] == [matmul.name], wrong


def quantized_encoder(model, batch):
    return model.image_encoder.blocks[0](model.image_encoder.patch_embed(batch["image"]))


def integer_oracle(matmul, left, right):
    """Accumulators by another route: values counted one code at a time, in int64 (object-free, no lanes shared)."""
    signed = torch.from_numpy(matmul.right.codes - matmul.right.zero_points[:, None]) if right is None else None
    operand, lanes = matmul.left, []
    if matmul.kind != "linear":
        a = torch.from_numpy(operand.table)[left] if hasattr(operand, "table") else left - operand.zero_point
        b = right - matmul.right.zero_point
        return torch.einsum("...mk,...kn->...mn", a.double(), b.double()).long()[..., None]
    if operand.family == "grouped":
        labels = torch.from_numpy(operand.labels())
        for g in range(operand.groups):
            member = (labels == g).long()
            lanes.append((left - int(operand.zero_points[g])) * member)
    elif operand.family == "hluq":
        split = operand.log_levels
        lanes = [
            torch.where(left > split, left - split, 0),
            sum((left == c).long() * 2 ** (split - 1 - c) for c in range(split)) + (left > split) * 2 ** (split - 1),
        ]
    else:
        lanes = [left - operand.zero_point]
    return torch.stack([(lane.double() @ signed.T.double()).long() for lane in lanes], -1)


def test_accumulators_equal_an_integer_oracle(quantized, spec, scenes):
    seen = set()

    def on_matmul(unit, call):
        matmul = spec[unit][call.site.node.name]
        if matmul.patches is None:
            result, _ = golden_output(matmul, call)
            left = call.left.flatten(0, -2) if matmul.kind == "linear" else call.left
            wanted = integer_oracle(matmul, left, call.right).numpy()
            assert np.array_equal(result.accumulators, wanted), (unit, matmul.name)
            limit = 2 ** (matmul.accumulator_bits - 1)
            assert -limit <= wanted.min() and wanted.max() < limit
            seen.add((unit, matmul.name))
        return call.float_output()

    with torch.no_grad(), interpreted(prepared_units(quantized), on_matmul):
        box_forward(quantized, scenes[0])
    assert len(seen) == sum(m.patches is None for _, m in spec.matmuls())


def test_interpreted_units_give_the_same_bits(quantized, scenes):
    with torch.no_grad():
        wanted = box_forward(quantized, scenes[0])
        with interpreted(prepared_units(quantized), lambda _, call: call.float_output()):
            found = box_forward(quantized, scenes[0])
        again = box_forward(quantized, scenes[0])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(wanted, found, again, strict=True))


def test_an_encoder_and_a_decoder_unit_on_photographs(quantized, spec, real_images):
    """Every matmul of both units on 8 photographs, and both units chained."""
    names = ("image_encoder.blocks.3", "mask_decoder.transformer.layers.0")
    part = dataclasses.replace(spec, units=tuple(spec[name] for name in names))
    rows, units = compare(quantized, part, real_images, box_forward)
    check_rows(rows)
    for unit in units:
        assert unit.codes and unit.share <= 0.001, unit
        assert unit.error < 0.01, unit


@pytest.mark.slow
def test_the_whole_model_on_photographs(quantized, spec, real_images):
    rows, units = compare(quantized, spec, real_images, box_forward)
    check_rows(rows)
    assert all(unit.share <= 0.001 for unit in units), units


RECIPES = {
    "uniform": {"name": "rtn"},
    "w8a8": {"name": "rtn", "w_bits": 8, "a_bits": 8, "cag": True, "hluq": True, "lnq": True},
    "w4a8": {"name": "rtn", "a_bits": 8, "agq": True},
    "agq": {"name": "rtn", "agq": True, "families": {"post_act": "power_of_two"}},
    "per channel": {"name": "rtn", "cag": True, "cag_groups": 0, "a_bits": 6, "families": {"post_act": "power_of_two"}},
    "odd bits": {"name": "rtn", "w_bits": 3, "a_bits": 5, "cag": True, "hluq": True, "agq": True},
    "everywhere": {"name": "rtn", "families": {"other_in": "hluq", "attn_out": "cag", "mlp_in": "lnq"}},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_family_and_width(recipe, tiny_sam, tiny_items):
    qmodel, _ = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, progress=False)
    spec = make_spec(qmodel, tiny_items[0], box_forward)
    assert spec.left_out == ()
    rows, units = compare(qmodel, spec, tiny_items[:1], box_forward)
    check_rows(rows)
    assert sum(unit.differing for unit in units) <= 0.001 * sum(unit.codes for unit in units)


HEADS = 2  # of the small SAM's encoder and decoder


def make_per_head(qmodel, batch):
    """Give the frozen quantizers of q, k and v a scale and a zero point for each head, in place, all different.

    In the encoder windows and heads share the first axis, heads innermost; in the decoder heads share the last axis
    with their channels.
    """
    shapes = {}
    chosen = {name: q for name, q in activation_quantizers(qmodel) if q.role in ("q", "k", "v")}
    with torch.no_grad(), watched(chosen, lambda name, _, x, out: shapes.setdefault(name, x.shape)):
        box_forward(qmodel, batch)
    for name, quantizer in chosen.items():
        scale = quantizer.scale.data * torch.tensor([0.8, 1.1])
        zero = (quantizer.zero_point + torch.tensor([0, 1])).clamp(0, quantizer.quant_max).int()
        if name.startswith("image_encoder"):
            quantizer.ch_axis, repeat = 0, lambda t, name=name: t.repeat(shapes[name][0] // HEADS)
        else:
            quantizer.ch_axis, repeat = 2, lambda t, name=name: t.repeat_interleave(shapes[name][2] // HEADS)
        quantizer.scale.data, quantizer.zero_point = repeat(scale), repeat(zero)
    return qmodel


def test_heads_with_scales_of_their_own(tiny_sam, tiny_items, tmp_path):
    qmodel, _ = quantize(tiny_sam, tiny_items, "rtn", 4, 4, forward=box_forward, progress=False)
    make_per_head(qmodel, tiny_items[0])
    spec = make_spec(qmodel, tiny_items[0], box_forward)
    assert spec.left_out == ()
    save_spec(spec, tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text())["format"] == "ahcq_plugin.spec/2"
    spec = load_spec(tmp_path)
    sides = {(m.kind, side): getattr(m, side) for _, m in spec.matmuls() for side in ("left", "right")}
    for side in (("qk", "left"), ("qk", "right"), ("av", "right")):
        operand = sides[side]
        assert operand.family == "per_head" and operand.heads == HEADS and len(set(operand.scales)) == HEADS
    rows, units = compare(qmodel, spec, tiny_items[:1], box_forward)
    check_rows(rows)
    assert sum(unit.differing for unit in units) <= 0.001 * sum(unit.codes for unit in units)
    swapped = [  # one head's scale in the place of another is noticed
        dataclasses.replace(
            unit,
            matmuls=tuple(
                dataclasses.replace(m, right=dataclasses.replace(m.right, scales=m.right.scales[::-1].copy()))
                if m.right.family == "per_head"
                else m
                for m in unit.matmuls
            ),
        )
        for unit in spec.units
    ]
    rows, _ = compare(qmodel, dataclasses.replace(spec, units=tuple(swapped)), tiny_items[:1], box_forward)
    assert {r.golden_error > r.golden_limit for r in rows if r.matmul.right.family == "per_head"} == {True}


class Scaled(nn.Module):
    """Attention whose scalar factors are computed from sizes and come before the matmul, on both sides."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 8)).unbind(-2)
        scores = (-q / math.sqrt(q.shape[-1])) @ (k * 3).transpose(-2, -1)
        return self.proj(scores.softmax(-1) @ v)


def test_scalar_factors_before_a_matmul():
    model = nn.Sequential(Scaled()).eval()
    batch = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    qmodel, _ = quantize(model, [batch], "rtn", 4, 4, units=["0"], progress=False)
    spec = make_spec(qmodel, batch)
    assert [m.kind for _, m in spec.matmuls()] == ["linear", "qk", "av", "linear"] and spec.left_out == ()
    rows, units = compare(qmodel, spec, [batch])
    check_rows(rows)
    assert units[0].differing == 0


def test_masks_of_the_model_in_integers(quantized, spec, scenes):
    """All units chained: codes on the edge of a level flip and the change spreads through the model, as it does in
    PyTorch itself when the last bits of the image change. Masks differ by no more than that."""
    golden, nudged = [], []
    for batch in scenes:
        with torch.no_grad():
            wanted = box_forward(quantized, batch)[0]
            other = box_forward(quantized, {**batch, "image": batch["image"] * (1 + 2**-22)})[0]
        found = golden_forward(quantized, spec, batch, box_forward)[0]
        assert not torch.equal(found, wanted)  # or nothing was replaced
        golden += mask_overlap(wanted, found)[0].tolist()
        nudged += mask_overlap(wanted, other)[0].tolist()
    assert np.mean(golden) > np.mean(nudged) - 0.1, (golden, nudged)


def test_mask_overlap():
    a = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]], [[[-1.0] * 4]], [[[-1.0, -1.0, -1.0, 2.0]]]])
    b = torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]], [[[-2.0] * 4]], [[[-1.0] * 4]]])
    overlap, flipped = mask_overlap(a, b)
    assert torch.allclose(overlap, torch.tensor([1 / 3, 1.0, 0.0])) and flipped == 3
