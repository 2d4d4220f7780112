# SPDX-License-Identifier: Apache-2.0
import copy
import logging
import sys

import pytest
import torch
from torch.nn import functional as F

from ahcq_plugin import quantize
from ahcq_plugin.ptq import prepare
from ahcq_plugin.ptq.center import center_heads
from ahcq_plugin.zoo.sam import box_forward
from tests.ptq.standins import Attention, heads
from tests.ptq.test_rotate import RECIPE, Shown, forward_in_float64, outputs, stand_in

CROSS = "mask_decoder.transformer.layers.0.cross_attn_image_to_token"


def middles(model, items, forward, names, tensor=lambda x, out: out):
    """(channels,) middle of the range over all tokens of what the layers ``names`` return, or of ``tensor(x, out)``."""
    rows = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: rows[name].append(tensor(args[0], out).flatten(0, -2))
        )
        for name in names
    ]
    outputs(model, items, forward)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(found).double() for name, found in rows.items()}
    return {name: (found.amin(0) + found.amax(0)) / 2 for name, found in rows.items()}


def test_the_function_of_a_sam_stays_in_float64(tiny_sam, tiny_items):
    """Every key and every value is centred, no query and no weight is touched, logits agree to 1e-9."""
    model, items, forward = tiny_sam, tiny_items, forward_in_float64
    model.image_encoder.double(), model.mask_decoder.double()
    prepare(model, RECIPE, run=lambda model: forward(model, items[0]))
    wanted, before = outputs(model, items, forward), copy.deepcopy(model.state_dict())
    done = center_heads(model, items, forward)
    assert len(done) == 2 * (2 + 2 * 3 + 1) and done[0] == "image_encoder.blocks.0.matmul"
    for found, target in zip(outputs(model, items, forward), wanted, strict=True):
        for value, goal in zip(found, target, strict=True):
            assert float((value - goal).abs().max()) < 1e-9 * float(goal.abs().max())
    found = middles(model, items, forward, ["image_encoder.blocks.0.attn.qkv", f"{CROSS}.k_proj", f"{CROSS}.v_proj"])
    queries, others = found.pop("image_encoder.blocks.0.attn.qkv").split([32, 64])
    assert float(torch.cat([others, *found.values()]).abs().max()) < 1e-12 < 1e-3 < float(queries.abs().max())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    attentions = [f"layers.{layer}.{part}" for layer in (0, 1) for part in parts] + ["final_attn_token_to_image"]
    projections = ("k_proj", "v_proj", "out_proj")
    decoder = {f"mask_decoder.transformer.{name}.{p}.bias" for name in attentions for p in projections}
    encoder = {f"image_encoder.blocks.{block}.attn.{p}.bias" for block in (0, 1) for p in ("qkv", "proj")}
    assert changed == decoder | encoder


def test_a_constant_planted_in_keys_and_values_is_gone(tiny_sam, tiny_items):
    """Softmax does not see the one, and the other comes out unchanged: with or without them, the same is left."""
    plain, planted = copy.deepcopy(tiny_sam), tiny_sam
    with torch.no_grad():
        planted.get_parameter(f"{CROSS}.k_proj.bias")[3] += 100.0
        planted.get_parameter(f"{CROSS}.v_proj.bias")[2] -= 10.0
    for model in (plain, planted):
        prepare(model, RECIPE, run=lambda model: box_forward(model, tiny_items[0]))
        center_heads(model, tiny_items, box_forward)
    for projection in ("k_proj", "v_proj"):
        name = f"{CROSS}.{projection}.bias"
        torch.testing.assert_close(planted.get_parameter(name), plain.get_parameter(name), rtol=0, atol=1e-4)


class Turned(Attention):
    """Keys are normalised: only values may be centred."""

    def forward(self, x):
        q, k, v = heads(self.q(x)), F.normalize(heads(self.k(x)), dim=-1), heads(self.v(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("attention", "count"), [(Attention, 2), (Turned, 1), (Shown, 1)])
def test_only_what_allows_it_is_centred(attention, count):
    model, item, forward = stand_in(attention)
    (wanted,) = outputs(model, [item], forward)
    assert len(center_heads(model, [item], forward)) == 2 * count
    (found,) = outputs(model, [item], forward)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize(("without", "count"), [("k", 1), ("v", 1), ("proj", 1)])
def test_without_a_bias_nothing_moves(without, count):
    class Attention_(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            getattr(self, without).register_parameter("bias", None)

    model, item, forward = stand_in(Attention_)
    assert len(center_heads(model, [item], forward)) == 2 * count


def test_a_unit_that_would_change_is_put_back(tiny_sam, tiny_items, monkeypatch, caplog):
    prepare(tiny_sam, RECIPE, run=lambda model: box_forward(model, tiny_items[0]))
    before = copy.deepcopy(tiny_sam.state_dict())
    follower = sys.modules["ahcq_plugin.ptq.head_channels"].HeadFollower
    behind = follower.behind
    wrong = lambda self, node, rows: (behind(self, node, rows)[0], behind(self, node, rows)[1].flip(0, 1))  # noqa: E731
    monkeypatch.setattr(follower, "behind", wrong)
    with caplog.at_level(logging.WARNING):
        assert center_heads(tiny_sam, tiny_items, box_forward) == []
    assert "its keys and values are not centred: that would change its output by" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in tiny_sam.state_dict().items())


def test_a_centred_model_passes_its_audit(tiny_sam, tiny_items):
    config = {"name": "rtn", "w_bits": 4, "a_bits": 4, "center": True}
    _, report = quantize(tiny_sam, tiny_items, config, forward=box_forward, progress=False)
    assert report.audit.passed
