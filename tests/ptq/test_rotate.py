# SPDX-License-Identifier: Apache-2.0
import copy
import logging
import sys

import pytest
import torch
from torch.nn import functional as F

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.rotate import rotate_heads
from ahcq_plugin.zoo.sam import box_forward
from tests.ptq.standins import Attention, Block, Model, heads

RECIPE = Recipe.from_config("qdrop")


def outputs(model, items, forward):
    with torch.no_grad():
        return [forward(model, item) for item in items]


def forward_in_float64(sam, item):
    """``box_forward`` but for the prompt encoder, whose code computes in float32 whatever its dtype."""
    sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
    return sam.mask_decoder(
        image_embeddings=sam.image_encoder(item["image"].double()),
        image_pe=sam.prompt_encoder.get_dense_pe().double(),
        sparse_prompt_embeddings=sparse.double(),
        dense_prompt_embeddings=dense.double(),
        multimask_output=False,
    )


def test_the_function_of_a_sam_stays_in_float64(tiny_sam, tiny_items):
    """Windows, relative positions, self- and cross-attention: every attention is rotated, logits agree to 1e-9."""
    model, items, forward = tiny_sam, tiny_items, forward_in_float64
    model.image_encoder.double(), model.mask_decoder.double()
    prepare(model, RECIPE, run=lambda model: forward(model, items[0]))
    wanted, before = outputs(model, items, forward), copy.deepcopy(model.state_dict())
    rotated = rotate_heads(model, items[0], forward)
    assert len(rotated) == 2 * (2 + 2 * 3 + 1) and rotated[0] == "image_encoder.blocks.0.matmul"
    for found, target in zip(outputs(model, items, forward), wanted, strict=True):
        for value, goal in zip(found, target, strict=True):
            assert float((value - goal).abs().max()) < 1e-9 * float(goal.abs().max())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    block, cross = "image_encoder.blocks.0.attn", "mask_decoder.transformer.layers.0.cross_attn_image_to_token"
    parts = [f"{block}.{part}" for part in ("qkv.weight", "qkv.bias", "proj.weight", "rel_pos_h", "rel_pos_w")]
    parts += [f"{cross}.{part}" for part in ("q_proj.weight", "k_proj.bias", "v_proj.weight", "out_proj.weight")]
    assert changed.issuperset(parts) and f"{block}.proj.bias" not in changed


def test_nothing_is_left_where_it_was_but_the_output(tiny_sam, tiny_items):
    """Queries are really mixed: an outlier channel of one head is spread over the head, and over no other."""
    name = "mask_decoder.transformer.layers.0.self_attn.q_proj"
    layer = tiny_sam.get_submodule(name)
    layer.bias.data[3] += 100.0
    prepare(tiny_sam, RECIPE, run=lambda model: box_forward(model, tiny_items[0]))
    bias = tiny_sam.get_parameter(f"{name}.bias")
    assert float(bias.abs().max()) > 99
    rotate_heads(tiny_sam, tiny_items[0], box_forward)
    first, second = bias.detach().split(8)  # 16 channels, two heads
    assert float(first.abs().min()) > 20 and float(first.abs().max()) < 50 and float(second.abs().max()) < 5


class Normed(Attention):
    """Queries and keys are normalised: only values may be rotated."""

    def forward(self, x):
        q, k, v = F.normalize(heads(self.q(x)), dim=-1), heads(self.k(x)), heads(self.v(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shown(Attention):
    """Values are used once more beside the attention: they must stay."""

    def forward(self, x):
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        context = F.scaled_dot_product_attention(q, k, v) + v
        return self.proj(context.transpose(1, 2).flatten(2))


def stand_in(attention):
    """A prepared model with such attentions, an item of it, and its forward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, item = Model(lambda: Block(attention)).eval(), (torch.randn(2, 3, 32, 32),)
    prepare(model, RECIPE, run=lambda model: model(*item))
    return model, item, lambda model, item: model(*item)


@pytest.mark.parametrize(("attention", "count"), [(Attention, 2), (Normed, 1), (Shown, 1)])
def test_only_what_passes_a_rotation_is_rotated(attention, count):
    model, item, forward = stand_in(attention)
    (wanted,) = outputs(model, [item], forward)
    assert len(rotate_heads(model, item, forward)) == 2 * count
    (found,) = outputs(model, [item], forward)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_unit_that_would_change_is_put_back(tiny_sam, tiny_items, monkeypatch, caplog):
    prepare(tiny_sam, RECIPE, run=lambda model: box_forward(model, tiny_items[0]))
    before = copy.deepcopy(tiny_sam.state_dict())
    stretched = lambda size: 2 * torch.eye(size, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(sys.modules["ahcq_plugin.ptq.rotate"], "head_rotation", stretched)
    with caplog.at_level(logging.WARNING):
        rotated = rotate_heads(tiny_sam, tiny_items[0], box_forward)
    assert rotated == [] and "its heads are not rotated: that would change its output by" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in tiny_sam.state_dict().items())


def test_a_rotated_model_passes_its_audit(tiny_sam, tiny_items):
    """... with channels of the attention's output in groups, as the preset has them."""
    config = {"name": "rtn", "w_bits": 4, "a_bits": 4, "rotate": True, "families": {"attn_out": "cag"}}
    _, report = quantize(tiny_sam, tiny_items, config, forward=box_forward, progress=False)
    assert report.audit.passed
