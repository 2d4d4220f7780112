# SPDX-License-Identifier: Apache-2.0
import copy
import logging

import pytest
import torch
from torch.nn import functional as F

from ahcq_plugin import quantize
from ahcq_plugin.prequant.streams import two_way_streams
from ahcq_plugin.ptq import prepare
from ahcq_plugin.ptq.center_norms import center_norms
from ahcq_plugin.zoo.hard import Hardness, harden
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_sam2
from tests.ptq.standins import Attention
from tests.ptq.test_center import middles
from tests.ptq.test_rotate import RECIPE, forward_in_float64, outputs, stand_in

DECODER = "mask_decoder.transformer"
NORMS = ["image_encoder.neck.3", *(f"{DECODER}.layers.0.norm{n}" for n in (1, 2, 3, 4))]
NORMS += [f"{DECODER}.layers.1.norm{n}" for n in (1, 2, 3)]
#: Layers that alone read a norm, and nothing else with it.
ALONE = [f"{DECODER}.layers.{layer}.mlp.lin1" for layer in (0, 1)]


def prepared(model, items, forward=box_forward):
    prepare(model, RECIPE, run=lambda model: forward(model, items[0]))
    return model


def seen_middles(model, items, names):
    """(channels,) middle of the range over all tokens of what each of the layers ``names`` sees."""
    return middles(model, items, box_forward, names, lambda x, out: x)


def close(found, wanted, share):
    for one, other in zip(found, wanted, strict=True):
        for value, goal in zip(one, other, strict=True):
            assert float((value - goal).abs().max()) < share * float(goal.abs().max())


def test_the_function_of_a_sam_stays_in_float64(tiny_sam, tiny_items):
    """Self- and cross-attention, tokens and image: every norm but the last of the image; only biases change."""
    model, items, forward = tiny_sam, tiny_items, forward_in_float64
    model.image_encoder.double(), model.mask_decoder.double()
    prepared(model, items, forward)
    wanted, before = outputs(model, items, forward), copy.deepcopy(dict(model.named_parameters()))
    assert sorted(center_norms(model, items, forward)) == sorted(NORMS)
    close(outputs(model, items, forward), wanted, 1e-9)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    layers = [f"{DECODER}.layers.{n}.{part}" for n in (0, 1) for part in ("mlp.lin1", "mlp.lin2")]
    attentions = [f"{DECODER}.layers.{n}.cross_attn_{a}" for n in (0, 1) for a in ("token_to_image", "image_to_token")]
    attentions += [f"{DECODER}.layers.1.self_attn"]
    layers += [f"{name}.{part}_proj" for name in attentions for part in ("q", "k", "v", "out")]
    layers += [f"{DECODER}.final_attn_token_to_image.{part}_proj" for part in ("q", "out")]
    assert changed == {f"{name}.bias" for name in (*NORMS, *layers)}


def test_what_one_layer_alone_reads_has_its_middles_at_zero(tiny_sam, tiny_items):
    model = prepared(tiny_sam, tiny_items)
    before = seen_middles(model, tiny_items, ALONE)
    assert all(float(middle.abs().max()) > 0.1 for middle in before.values())
    center_norms(model, tiny_items, box_forward)
    for middle in seen_middles(model, tiny_items, ALONE).values():
        assert float(middle.abs().max()) < 1e-4


def test_planted_offsets_are_gone(tiny_sam, tiny_items):
    """With or without them, the same is left."""
    plain, planted = copy.deepcopy(tiny_sam), harden(tiny_sam, Hardness(offsets=10.0))
    readers = [f"{DECODER}.layers.1.cross_attn_token_to_image.v_proj", f"{DECODER}.layers.1.self_attn.v_proj", *ALONE]
    before = [seen_middles(model, tiny_items, readers) for model in (plain, planted)]
    for model in (plain, planted):
        prepared(model, tiny_items)
        center_norms(model, tiny_items, box_forward)
    after = [seen_middles(model, tiny_items, readers) for model in (plain, planted)]
    for name in readers:
        assert float((before[0][name] - before[1][name]).abs().max()) > 1.0
        torch.testing.assert_close(after[1][name], after[0][name], rtol=0, atol=1e-3)


def test_masks_of_quantized_offsets_are_nearer(tiny_sam, tiny_items):
    sam = harden(tiny_sam, Hardness(offsets=10.0))
    wanted = torch.cat([out[0].flatten() for out in outputs(sam, tiny_items, box_forward)])
    errors = {}
    for center in (False, True):
        recipe = {"name": "rtn", "w_bits": 4, "a_bits": 4, "center_norms": center}
        model, report = quantize(copy.deepcopy(sam), tiny_items, recipe, forward=box_forward, progress=False)
        assert report.audit.passed
        found = torch.cat([out[0].flatten() for out in outputs(model, tiny_items, box_forward)])
        errors[center] = float(F.mse_loss(found, wanted) / wanted.square().mean())
    assert errors[True] < 0.5 * errors[False]


def test_sam_2_has_the_decoder_and_no_such_neck():
    names = [name for name, _ in two_way_streams(make_sam2())]
    transformer = "sam_mask_decoder.transformer"
    expected = [f"{transformer}.layers.{layer}.norm{n}" for layer in (0, 1) for n in (1, 2, 3)]
    assert sorted(names) == sorted([*expected, f"{transformer}.layers.0.norm4"])


def test_others_are_left():
    model, item, forward = stand_in(Attention)
    assert center_norms(model, [item], forward) == []


@pytest.mark.parametrize("place", ["norm1", "mlp.lin1", "mlp.lin2"])
def test_without_a_bias_nothing_moves(tiny_sam, tiny_items, place):
    """Of the norm itself, of its reader, of the layer that is added: each is needed."""
    layer = tiny_sam.get_submodule(f"{DECODER}.layers.0.{place}")
    layer.register_parameter("bias", None)
    model = prepared(tiny_sam, tiny_items)
    wanted = outputs(model, tiny_items, box_forward)
    left = "norm1" if place == "norm1" else "norm2"
    assert sorted(center_norms(model, tiny_items, box_forward)) == sorted({*NORMS} - {f"{DECODER}.layers.0.{left}"})
    close(outputs(model, tiny_items, box_forward), wanted, 1e-4)


def test_a_norm_that_something_else_reads_is_put_back(tiny_sam, tiny_items, caplog):
    """The image embedding goes into the logits as well: it stays, with a warning, and all others are centred."""
    model = prepared(tiny_sam, tiny_items)
    before = copy.deepcopy(dict(model.named_parameters()))

    def forward(sam, item):
        kept = []
        hook = sam.image_encoder.register_forward_hook(lambda _, args, out: kept.append(out))
        masks, qualities = box_forward(sam, item)
        hook.remove()
        return masks + kept[0].square().mean(), qualities

    wanted = outputs(model, tiny_items, forward)
    with caplog.at_level(logging.WARNING):
        done = center_norms(model, tiny_items, forward)
    assert sorted(done) == sorted(NORMS[1:])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{NORMS[0]}: its channels are not centred: that would change")
    assert torch.equal(model.get_parameter(f"{NORMS[0]}.bias"), before[f"{NORMS[0]}.bias"])
    close(outputs(model, tiny_items, forward), wanted, 1e-4)
