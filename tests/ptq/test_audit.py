# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare, quantizers
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.zoo.sam import box_forward

DROPPED = "image_encoder.blocks.0"


@pytest.fixture
def frozen(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    return freeze(tiny_sam)


def activation(model, part):
    return next((n, q) for n, q in quantizers(model) if part in n and q.role != "weight")


def one_problem(model, items):
    report = audit(model, items[2], box_forward)
    assert not report.passed
    return report.problems


def test_clean_model_passes_and_counts(frozen, tiny_items):
    report = audit(frozen, tiny_items[2], box_forward)
    assert report.passed and report.problems == []
    weights = sum(layer.weight.numel() for layer in weight_layers(frozen).values())
    assert report.counts["weight"] == weights
    # lin2 sees 64 tokens x 64 hidden in 2 encoder blocks, 3 boxes x 7 tokens x 32 hidden in 2 decoder layers.
    assert report.counts["post_act"] == 2 * 64 * 64 + 2 * 3 * 7 * 32
    assert set(report.counts) == {
        "weight", "qkv_in", "mlp_in", "post_act", "softmax", "q", "k", "v", "attn_out", "conv_in"
    }  # fmt: skip
    assert report.to_dict()["passed"] is True


def test_drop_mode_left_on(frozen, tiny_items):
    name, quantizer = activation(frozen, DROPPED)
    quantizer.prob = 0.5
    problems = one_problem(frozen, tiny_items)
    assert f"{name}: drop mode is on: only 50% of the elements are quantized" in problems
    assert any(p.startswith(name) and "differs from decode(encode(input))" in p for p in problems)


def test_drop_hidden_from_the_flag_is_still_seen(frozen, tiny_items):
    name, quantizer = activation(frozen, DROPPED)
    exact = quantizer.quantize
    quantizer.quantize = lambda x, drop: torch.where(torch.arange(x.numel()).view(x.shape) % 7 == 0, x, exact(x))
    problems = one_problem(frozen, tiny_items)
    assert len(problems) == 1 and problems[0].startswith(name) and "differs from decode(encode(input))" in problems[0]


def test_bits_that_are_not_the_recipes(frozen, tiny_items):
    items = tiny_items[2], box_forward
    assert audit(frozen, *items, recipe=Recipe.from_config("rtn")).passed
    kinds = {quantizer_name: quantizer.role == "weight" for quantizer_name, quantizer in quantizers(frozen)}
    for recipe, wrong in ((dict(w_bits=5), True), (dict(a_bits=3), False)):
        report = audit(frozen, *items, recipe=Recipe.from_config("rtn", **recipe))
        bits = next(iter(recipe.values()))
        expected = [
            f"{n}: it has 4 bits, the recipe says {bits}" for n, is_weight in kinds.items() if is_weight is wrong
        ]
        assert report.problems == expected


def test_one_soft_layer(frozen, tiny_items):
    name, layer = next(iter(weight_layers(frozen).items()))
    layer.weight_fake_quant.init(layer.weight)
    layer.weight_fake_quant.alpha.data.normal_()
    problems = one_problem(frozen, tiny_items)
    assert f"{name}.weight_fake_quant: soft rounding is on" in problems
    assert any("differs from decode(encode(input))" in p for p in problems)


def test_one_off_grid_weight(frozen, tiny_items):
    name, layer = list(weight_layers(frozen).items())[3]
    with torch.no_grad():
        layer.weight[1, 2] += float(layer.weight_fake_quant.scale[1]) * 0.3
    assert one_problem(frozen, tiny_items) == [f"{name}: 1 of {layer.weight.numel()} weights are off their grid"]


def test_observer_on(frozen, tiny_items):
    name, quantizer = activation(frozen, "neck")
    quantizer.enable_observer()
    assert one_problem(frozen, tiny_items) == [f"{name}: its observer is on"]


def test_one_quantizer_off(frozen, tiny_items):
    name, quantizer = activation(frozen, "final_attn")
    quantizer.enable_fake_quant(False)
    problems = one_problem(frozen, tiny_items)
    assert f"{name}: quantization is off" in problems


def test_quantizer_removed_from_the_graph(frozen, tiny_items):
    """A Linear that reads an unquantized tensor, and an attention matmul likewise."""
    unit = frozen.get_submodule("image_encoder.blocks.1")
    for node in list(unit.graph.nodes):
        if node.op == "call_module" and getattr(unit.get_submodule(node.target), "role", "") in ("mlp_in", "softmax"):
            node.replace_all_uses_with(node.args[0])
            unit.graph.erase_node(node)
    unit.recompile()
    problems = one_problem(frozen, tiny_items)
    assert "image_encoder.blocks.1.mlp.lin1: its input is not quantized" in problems
    assert any("its left operand is not quantized" in p for p in problems)
    assert sum("no data reaches it" in p for p in problems) == 2


def test_model_without_units_fails(tiny_sam, tiny_items):
    assert audit(tiny_sam, tiny_items[0], box_forward).problems[0].startswith("the model has no quantized unit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(frozen, tiny_items, value):
    image = tiny_items[2]["image"].clone()
    image[0, 0, 5, 5] = value
    problems = one_problem(frozen, [None, None, {**tiny_items[2], "image": image}])
    assert any(DROPPED in problem and "its input holds NaN or infinite values" in problem for problem in problems)


def test_an_output_that_is_not_finite(frozen, tiny_items):
    report = audit(frozen, tiny_items[2], lambda model, item: [t / 0 for t in box_forward(model, item)])
    assert report.problems == ["the model's output holds NaN or infinite values"]
