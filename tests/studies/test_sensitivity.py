# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers
from ahcq_plugin.studies.sensitivity import role_sensitivity
from ahcq_plugin.zoo.sam import box_forward


def agreement(out, reference):
    """0 for equal logits, less the more they differ."""
    return -(out[0] - reference[0]).square().mean((-2, -1)).sqrt()


def test_each_role_alone_against_quantizers_switched_by_hand(tiny_sam, tiny_items):
    again = copy.deepcopy(tiny_sam)
    recipe = Recipe.from_config("qdrop", w_bits=4, a_bits=4)
    agreements = role_sensitivity(tiny_sam, tiny_items, tiny_items, recipe, agreement, box_forward, progress=False)
    assert not any(quantizer.quantizing for _, quantizer in quantizers(tiny_sam))
    parts = {"image_encoder", "mask_decoder"}
    roles = {"qkv_in", "q", "k", "v", "softmax", "attn_out", "mlp_in", "post_act", "weight"}
    assert set(agreements) == {f"{p} {r}" for p in parts for r in roles} | {"image_encoder conv_in", "everything"}
    with torch.no_grad():
        expected = [box_forward(again, item) for item in tiny_items]
        prepare(again, recipe)
        calibrate(again, tiny_items, box_forward, progress=False)
        for name, quantizer in quantizers(again):
            quantizer.enable_fake_quant(name.startswith("mask_decoder") and quantizer.role == "k")
        values = [agreement(box_forward(again, item), out) for item, out in zip(tiny_items, expected, strict=True)]
    assert agreements["mask_decoder k"] == float(torch.cat([v.reshape(-1) for v in values]).mean())
    assert agreements["everything"] < min(value for group, value in agreements.items() if group != "everything")
    assert all(value < 0 for value in agreements.values())


@pytest.mark.slow
def test_conditioned_weights_count_as_quantization_of_weights(tiny_sam, tiny_items):
    """With ACNR, too strong, and 8 bits: roles of activations do as little as without it, the weights much more."""

    def measured(**keys):
        recipe = Recipe.from_config("qdrop", w_bits=8, a_bits=8, acnr_lambda=10.0, **keys)
        model = copy.deepcopy(tiny_sam)
        return role_sensitivity(model, tiny_items, tiny_items, recipe, agreement, box_forward, progress=False)

    plain, conditioned = measured(), measured(acnr=True)
    for role in ("q", "k", "v", "softmax"):
        assert conditioned[f"image_encoder {role}"] > 2 * plain[f"image_encoder {role}"]  # both below 0
    assert conditioned["image_encoder weight"] < 10 * plain["image_encoder weight"]


def test_nothing_to_compare_is_said_before_any_work(tiny_sam, tiny_items):
    with pytest.raises(ValueError, match="`batches` is empty"):
        role_sensitivity(tiny_sam, tiny_items, [], Recipe.from_config("qdrop"), agreement, box_forward)
