# SPDX-License-Identifier: Apache-2.0
"""One scale a head for queries, keys and values, from the graph to the integers."""

import numpy as np
import pytest
import torch

from ahcq_plugin import quantize
from ahcq_plugin.export import golden, make_spec
from ahcq_plugin.export.compare import compare
from ahcq_plugin.graph import describe
from ahcq_plugin.integer import to_integer, use_backend
from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.prepared import activation_quantizers, watched
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.conftest import TINY_SAM, assert_packed_file_gives_back, make_tiny_items, make_tiny_sam
from tests.integer.test_heads import products

RECIPE = {"name": "rtn", "w_bits": 4, "a_bits": 4, "per_head": True}
ITEMS = make_tiny_items()


@pytest.fixture(scope="module")
def per_head():
    """The small SAM and the report of its quantization."""
    return quantize(make_tiny_sam(), ITEMS[:2], RECIPE, forward=box_forward, progress=False)


def attention_operands(model):
    return {name: q for name, q in activation_quantizers(model) if q.role in ("q", "k", "v")}


def test_every_head_has_the_range_of_its_values():
    """Two heads: in the encoder they share the first axis with windows, in the decoder the last with channels."""
    model = make_tiny_sam()
    prepare(model, Recipe.from_config(RECIPE))
    assert any(row.quantizer.endswith("per head") for row in describe(model).rows if row.role == "q")
    seen: dict[str, list] = {}
    with torch.no_grad(), watched(attention_operands(model), lambda n, q, x, out: seen.setdefault(n, []).append(x)):
        for item in ITEMS[:2]:
            box_forward(model, item)
    calibrate(model, ITEMS[:2], box_forward, progress=False)
    chosen = attention_operands(model)
    assert len(chosen) == 2 * 3 + 7 * 3
    for name, quantizer in chosen.items():
        in_encoder, half = name.startswith("image_encoder"), seen[name][0].shape[-1] // 2
        assert quantizer.head_axis == (HeadAxis(3, 2, 1) if in_encoder else HeadAxis(1, 2, half))
        for head in range(2):
            parts = [x[head::2] if in_encoder else x[..., head * half : (head + 1) * half] for x in seen[name]]
            lo = min(0.0, sum(float(part.min()) for part in parts) / 2)
            hi = max(0.0, sum(float(part.max()) for part in parts) / 2)
            assert float(quantizer.scale[head]) == pytest.approx((hi - lo) / 15, rel=1e-5), name


def test_spec_golden_model_and_integers_are_exact(per_head):
    model, report = per_head
    assert report.audit.passed
    spec = make_spec(model, ITEMS[0], box_forward)
    assert spec.left_out == ()
    kinds = [(m.kind, m.left.family, m.right.family) for _, m in spec.matmuls() if m.kind != "linear"]
    assert set(kinds) == {("qk", "per_head", "per_head"), ("av", "uniform", "per_head")} and len(kinds) == 18
    rows, units = compare(model, spec, ITEMS[2:], box_forward)  # another number of boxes
    assert [r for r in rows if r.golden_error > r.golden_limit or r.torch_error > r.torch_limit] == []
    assert sum(unit.differing for unit in units) <= 0.001 * sum(unit.codes for unit in units)
    integer, calls = to_integer(model), []
    for key, module in products(model, integer).items():
        module.register_forward_hook(lambda _, args, out, key=key: calls.append((key, args[:2], out)))
    with torch.no_grad(), use_backend("reference"):
        found = box_forward(integer, ITEMS[0])
    assert len(calls) == 18
    of_node = {(unit.name, m.name): m for unit, m in spec.matmuls()}
    for key, (left, right), out in calls:
        right = right.numpy() if of_node[key].kind == "av" else np.swapaxes(right.numpy(), -1, -2)
        np.testing.assert_array_equal(out.numpy(), golden.run(of_node[key], left.numpy(), right).output)
    with torch.no_grad():
        for a, b in zip(found, box_forward(model, ITEMS[0]), strict=True):
            assert a.shape == b.shape and float((a - b).norm() / b.norm()) < 0.2  # a code may flip, and spread


def test_a_packed_file_gives_it_back(per_head, tmp_path):
    assert_packed_file_gives_back(*per_head, ITEMS[2:3], tmp_path / "heads.safetensors")


@pytest.mark.slow
def test_heads_learn_with_every_recipe_that_learns(tiny_sam):
    """With groups, folded keys, ranges by focus, learned scales: audited, and the scales of heads move apart."""
    recipe = {"name": "ahcq", "lnq": False, "acnr": False, "big": True, "pcc": True, "per_head": True}
    recipe |= {"w_bits": 4, "a_bits": 4, "iterations": 2, "scale_lr": 1e-3}
    model, report = quantize(tiny_sam, ITEMS[:1], recipe, forward=box_forward, progress=False)
    assert report.audit.passed
    assert all(q.scale.numel() == 2 and q.scale.unique().numel() == 2 for q in attention_operands(model).values())


def test_heads_that_share_channels_keep_one_scale():
    """An attention of one head, and a tensor whose channels cannot be followed, are as without the switch."""
    model, report = quantize(
        build_sam({**TINY_SAM, "num_heads": 1}, checkpoint=False),
        ITEMS[:1],
        RECIPE,
        forward=box_forward,
        progress=False,
    )
    encoder = [q for name, q in attention_operands(model).items() if name.startswith("image_encoder")]
    assert report.audit.passed and all(q.scale.numel() == 1 for q in encoder)
    with pytest.raises(ValueError, match="`per_head` and `range_by_output_error` exclude each other"):
        Recipe.from_config("ahcq", per_head=True, range_by_output_error=True)
