# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.ptq.precondition import precondition
from ahcq_plugin.ptq.prepared import original_weights, weight_layers
from ahcq_plugin.studies.conditioning_errors import conditioning_errors, draw_conditioning
from ahcq_plugin.zoo.sam import box_forward


@pytest.fixture
def conditioned(tiny_sam, tiny_items):
    """The tiny SAM with one weight made ill-conditioned, after ACNR."""
    with torch.no_grad():
        weight = tiny_sam.image_encoder.blocks[0].mlp.lin1.weight
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(left * torch.logspace(0, -5, len(values)) @ right)
    recipe = Recipe.from_config("qdrop", w_bits=4, a_bits=4, acnr=True)
    prepare(tiny_sam, recipe)
    precondition(tiny_sam, tiny_items, recipe, box_forward, progress=False)
    calibrate_activations(tiny_sam, tiny_items, box_forward, progress=False)
    return tiny_sam


def test_errors_are_those_of_the_definition(conditioned, tiny_items):
    layers = {name: layer for name, layer in weight_layers(conditioned).items() if layer.original_weight is not None}
    errors = conditioning_errors(conditioned, tiny_items, box_forward)
    assert [error.layer for error in errors] == list(layers)
    name = next(name for name in layers if name.endswith("blocks.0.mlp.lin1"))
    measured, layer = next(error for error in errors if error.layer == name), layers[name]
    unit = conditioned.image_encoder.blocks[0]
    quantizer = next(m for m in unit.modules() if layer in getattr(m, "consumers", ()))
    kept = []
    hook = quantizer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        changed, original = layer.weight.detach().clone(), layer.original_weight
        with original_weights(conditioned):
            for item in tiny_items:
                box_forward(conditioned, item)
        hook.remove()
        x = torch.cat([t.flatten(0, -2) for t in kept]).double()
        x_hat = quantizer.decode(quantizer.encode(x.float())).double()
        wanted = x @ original.double().T
        outputs = {
            "inputs": x_hat @ original.double().T,
            "weight": x @ changed.double().T,
            "both": x_hat @ changed.double().T,
        }
    for attribute, output in outputs.items():
        error = float((output - wanted).square().sum() / wanted.square().sum())
        assert getattr(measured, attribute) == pytest.approx(error, rel=1e-3), attribute
    assert measured.weight > 0 and measured.rounded_before > measured.inputs and measured.rounded_after > measured.both
    assert torch.equal(layer.weight, changed)


def test_picture_and_summary(conditioned, tiny_items, tmp_path):
    errors = conditioning_errors(conditioned, tiny_items, box_forward)
    numbers = draw_conditioning(conditioned, tiny_items, tmp_path, box_forward)
    assert (tmp_path / "conditioning.png").read_bytes().startswith(b"\x89PNG")
    assert numbers["conditioned layers"] == len(errors) > 0
    product = 1.0
    for error in errors:
        product *= error.both / error.inputs
    assert numbers["conditioned error"] == pytest.approx(product ** (1 / len(errors)), rel=1e-6)


def test_nothing_changed(tiny_sam, tiny_items, tmp_path):
    prepare(tiny_sam, Recipe.from_config("qdrop"))
    calibrate_activations(tiny_sam, tiny_items, box_forward, progress=False)
    assert conditioning_errors(tiny_sam, tiny_items, box_forward) == []
    assert draw_conditioning(tiny_sam, tiny_items, tmp_path, box_forward)["conditioned error"] == 1.0
