# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, prepare, set_quantization
from ahcq_plugin.ptq.prepared import watched, weight_layers
from ahcq_plugin.ptq.refit import _levels, refit
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.sam import box_forward
from tests.ptq.standins import Model

QDROP = {"name": "qdrop", "w_bits": 4, "a_bits": 3, "iterations": 3}
BLOCK = "image_encoder.blocks.1"


def collected(sam, items, name=BLOCK):
    recipe = Recipe.from_config(QDROP)
    prepare(sam, recipe)
    calibrate(sam, items, box_forward, progress=False)
    stream = UnitStream(sam, items, box_forward)
    for unit in stream.order:
        stream.collect(unit)
        if unit == name:
            return stream
        stream.advance(unit)


def layer_outputs(stream, name, kind, activations):
    """Layer -> outputs of all calls on all samples."""
    found = {}
    set_quantization(stream.units[name], False, activations)
    with (
        torch.no_grad(),
        watched(weight_layers(stream.units[name]), lambda n, _, x, out: found.setdefault(n, []).append(out)),
    ):
        for sample in range(len(stream.samples)):
            args, kwargs = stream.inputs(kind, sample)
            stream.units[name](*args, **kwargs)
    return {layer: torch.cat([o.flatten(0, -2) for o in outs]) for layer, outs in found.items()}


def test_every_layer_comes_closer_to_its_floating_point_output(tiny_sam, tiny_items):
    stream = collected(tiny_sam, tiny_items)
    wanted = layer_outputs(stream, BLOCK, "floating", False)
    before = layer_outputs(stream, BLOCK, "quantized", True)
    old = {name: layer.weight_fake_quant.scale.clone() for name, layer in weight_layers(stream.units[BLOCK]).items()}
    assert refit(stream, BLOCK, 0.03) == ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
    after = layer_outputs(stream, BLOCK, "quantized", True)
    for name, target in wanted.items():
        assert (after[name] - target).square().mean() < 0.95 * (before[name] - target).square().mean(), name
    for name, layer in weight_layers(stream.units[BLOCK]).items():
        quantizer = layer.weight_fake_quant
        assert not torch.equal(quantizer.scale, old[name])  # the range is that of the new weight
        step = (quantizer.decode(quantizer.encode(layer.weight)) - layer.weight).abs() / quantizer.scale[:, None]
        assert step.median() < 0.5


def test_a_layer_sees_what_the_fitted_ones_before_it_give(tiny_sam, tiny_items):
    """The last layer is fitted to inputs that the others as fitted give: fitting it once more moves nothing."""
    stream = collected(tiny_sam, tiny_items)
    refit(stream, BLOCK, 1e-6)
    layer = stream.units[BLOCK].mlp.lin2
    seen, unit = [], stream.units[BLOCK]
    set_quantization(unit, False, True)
    with torch.no_grad(), watched({"lin2": layer}, lambda n, _, x, out: seen.append(x.flatten(0, -2))):
        for sample in range(len(stream.samples)):
            args, kwargs = stream.inputs("quantized", sample)
            unit(*args, **kwargs)
    x = torch.cat(seen).double()
    system = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    fresh = {name: p.clone() for name, p in unit.named_parameters()}
    # normal equations hold: the residual is orthogonal to every input, up to the penalty
    wanted = original_outputs(tiny_items)["mlp.lin2"].double()
    residual = wanted - (x @ layer.weight.double().T + layer.bias.double())
    assert (system.T @ residual).abs().max() < 1e-3 * (system.T @ wanted).abs().max()
    assert all(torch.equal(p, fresh[name]) for name, p in unit.named_parameters())


def original_outputs(items):
    from tests.conftest import make_tiny_sam

    sam, found = make_tiny_sam(), {}
    layers = {n: m for n, m in sam.get_submodule(BLOCK).named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), watched(layers, lambda n, _, x, out: found.setdefault(n, []).append(out.flatten(0, -2))):
        for item in items:
            box_forward(sam, item)
    return {name: torch.cat(outs) for name, outs in found.items()}


def test_levels_follow_the_computation(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config(QDROP))
    unit = prepared_units(tiny_sam)["mask_decoder.transformer.layers.1"]
    layers = {n: m for n, m in weight_layers(unit).items() if isinstance(m, nn.Linear)}
    levels = [set(level) for level in _levels(unit, layers)]
    assert set().union(*levels) == set(layers) and sum(map(len, levels)) == len(layers)
    assert {f"self_attn.{n}_proj" for n in "qkv"} <= levels[0] and "self_attn.out_proj" in levels[1]
    place = {layer: number for number, level in enumerate(levels) for layer in level}
    order = ["self_attn.out_proj", "cross_attn_token_to_image.q_proj", "cross_attn_token_to_image.out_proj"]
    order += ["mlp.lin1", "mlp.lin2", "cross_attn_image_to_token.k_proj", "cross_attn_image_to_token.out_proj"]
    assert [place[layer] for layer in order] == sorted({place[layer] for layer in order})


def test_a_refitted_model_is_closer_and_passes_its_audit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, items = Model().eval(), [(torch.randn(2, 3, 32, 32),) for _ in range(4)]
    errors = []
    for strength in (0.0, 0.03):
        _, report = quantize(model, items, {"name": "rtn", "w_bits": 6, "a_bits": 3, "refit": strength}, progress=False)
        assert report.audit.passed
        errors.append([unit.error_after for unit in report.units])
    assert len(errors[0]) == 2 and all(after < 0.9 * before for before, after in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "ahcq", "refit": 0.03}, "`refit` and `acnr` exclude each other; set one of them to False or 0"),
        ({"name": "adaround", "refit": 0.03}, "`refit` needs the granularity `unit` or `none`, got 'layer'"),
        ({"name": "qdrop", "refit": -1.0}, "`refit` must not be negative, got -1.0"),
        ({"name": "qdrop", "tune_steps": -1}, r"`tune_steps` must be in \[0, 10000000\], got -1"),
        ({"name": "qdrop", "tune_lr": 0.0}, "`tune_lr` must be positive, got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_config(config)
