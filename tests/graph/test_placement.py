# SPDX-License-Identifier: Apache-2.0
"""Placed quantizers see the tensors of the original module, and reach all consumers of a site."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ahcq_plugin.graph import describe, place, trace_unit
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.coverage import INTEGERS, OUTSIDE, cover

segment_anything = pytest.importorskip("segment_anything.modeling.image_encoder")


class Record(nn.Module):
    """Keeps what it sees; ``gain`` changes what the consumers see."""

    def __init__(self, gain: float = 1.0, bits: int = 4, ch_axis: int = -1) -> None:
        super().__init__()
        self.gain, self.bits, self.ch_axis, self.seen = gain, bits, ch_axis, None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return x * self.gain


def identity(*_) -> nn.Module:
    return nn.Identity()


def nothing(*_) -> None:
    return None


@pytest.fixture
def block(randomized) -> nn.Module:
    return randomized(
        segment_anything.Block(dim=16, num_heads=2, mlp_ratio=2, use_rel_pos=True, window_size=3, input_size=(7, 7))
    )


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 7, 7, 16, generator=torch.Generator().manual_seed(1))


def test_identity_quantizers_change_nothing(block, image, tiny_sam):
    gm = trace_unit(block, "block")
    placements = place(gm, identity, identity)
    assert len(placements) == 8 and torch.equal(gm(image), block(image))
    layer = tiny_sam.mask_decoder.transformer.layers[0]
    gm = trace_unit(layer, "layer")
    assert len(place(gm, identity, identity, share_inputs=False)) == 26
    tokens, pixels = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    for got, expected in zip(gm(tokens, pixels, tokens, pixels), layer(tokens, pixels, tokens, pixels), strict=True):
        assert torch.equal(got, expected)


def test_every_quantizer_sees_the_tensor_that_the_original_module_computes(block, image):
    seen: dict[str, Tensor] = {}

    def hook(name):
        return lambda module, args, output: seen.update({f"{name}.in": args[0], f"{name}.out": output})

    for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
        block.get_submodule(name).register_forward_hook(hook(name))
    block(image)
    qkv = seen["attn.qkv.out"].reshape(18, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).reshape(3, 36, 9, 8)
    attention = block.attn
    logits = (qkv[0] * attention.scale) @ qkv[1].transpose(-2, -1)
    logits = segment_anything.add_decomposed_rel_pos(
        logits, qkv[0], attention.rel_pos_h, attention.rel_pos_w, (3, 3), (3, 3)
    )
    expected = {
        "qkv_in": seen["attn.qkv.in"],
        "q": qkv[0],
        "k": qkv[1],
        "v": qkv[2],
        "softmax": logits.softmax(-1),
        "attn_out": seen["attn.proj.in"],
        "mlp_in": seen["mlp.lin1.in"],
        "post_act": seen["mlp.lin2.in"],
    }

    gm = trace_unit(block, "block")
    placements = place(gm, lambda role, site: Record(), nothing)
    gm(image)
    recorded = {p.role: gm.get_submodule(p.quantizer_name).seen for p in placements}
    assert set(recorded) == set(expected)
    for role, tensor in expected.items():
        assert torch.equal(recorded[role], tensor), role


def test_the_position_bias_sees_the_quantized_q(block, image):
    """Scaling q by 2 must equal scaling the q rows of the projection by 2 (weights, bias): powers of two are exact."""
    gm = trace_unit(block, "block")
    place(gm, lambda role, site: Record(gain=2.0) if role == "q" else None, nothing)
    scaled = copy.deepcopy(block)
    with torch.no_grad():
        scaled.attn.qkv.weight[:16] *= 2
        scaled.attn.qkv.bias[:16] *= 2
    assert torch.equal(gm(image), scaled(image)) and not torch.equal(gm(image), block(image))


def test_residuals_bypass_layer_input_quantizers(block, image):
    gm = trace_unit(block, "block")
    place(gm, lambda role, site: Record(gain=0.0) if role in ("qkv_in", "mlp_in") else None, nothing)
    silent = copy.deepcopy(block)
    with torch.no_grad():
        for name in ("attn.qkv.weight", "mlp.lin1.weight"):
            silent.get_parameter(name).zero_()
    assert torch.equal(gm(image), silent(image))


def test_weight_quantizers_quantize_every_layer_and_keep_parameters_and_keys(block, image):
    gm = trace_unit(block, "block")
    made = {}
    place(gm, nothing, lambda layer, name: made.setdefault(name, Record(gain=0.5)))
    assert list(made) == ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
    halved = copy.deepcopy(block)
    with torch.no_grad():
        for name in made:
            halved.get_submodule(name).weight *= 0.5
    assert torch.equal(gm(image), halved(image))
    assert gm.attn.qkv.weight is block.attn.qkv.weight and type(block.attn.qkv) is nn.Linear
    assert set(gm.state_dict()) == set(block.state_dict())


def test_one_quantizer_per_tensor_and_role_or_one_per_layer(tiny_sam):
    layer = tiny_sam.mask_decoder.transformer.layers[0]
    shared = place(trace_unit(layer, "layer"), identity, nothing)
    single = place(trace_unit(layer, "layer"), identity, nothing, share_inputs=False)
    assert shared[0].layers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert [p.layers for p in single[:3]] == [(name,) for name in shared[0].layers]
    for placements in (shared, single):
        names = [p.quantizer_name for p in placements]
        assert len(set(names)) == len(names) and all(n.endswith("_post_act_fake_quantizer") for n in names)


def test_placements_survive_deepcopy_and_cannot_be_made_twice(block, image):
    gm = trace_unit(block, "block")
    placements = place(gm, lambda role, site: Record(), identity)
    twin = copy.deepcopy(gm)
    assert twin.meta["ahcq_unit"] == {"name": "block", "leave": (), "call": None, "placements": placements}
    assert torch.equal(twin(image), gm(image))
    nodes = {node.name: node for node in twin.graph.nodes}
    modules = dict(twin.named_modules())
    for placement in placements:
        assert isinstance(modules[placement.quantizer_name], Record)
        for consumer, key in placement.consumers:
            assert nodes[consumer].args[key].target == placement.quantizer_name
            assert nodes[consumer].args[key].args[0] is nodes[placement.node]
    with pytest.raises(ValueError, match="unit 'block' has quantizers already"):
        place(twin, identity, identity)


def test_sites_left_in_floating_point_get_no_quantizer(block, image):
    gm = trace_unit(block, "block")
    placements = place(gm, lambda role, site: identity() if role == "softmax" else None, nothing)
    assert [p.role for p in placements] == ["softmax"]
    assert sum(node.op == "call_module" for node in gm.graph.nodes) == 8  # seven of the block's own, one quantizer
    assert torch.equal(gm(image), block(image))


def test_one_use_shared_by_q_k_and_v_gets_one_quantizer():
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(4, 4)

        def forward(self, a: Tensor) -> Tensor:
            x = self.x(a).reshape(1, 4, 4)
            return torch.matmul(x, x.transpose(1, 2)).softmax(-1) @ x

    unit, a = Self(), torch.randn(4, 4)
    gm = trace_unit(unit, "self")
    placements = place(gm, lambda role, site: Record(gain=2.0) if role in "qkv" else None, nothing)
    assert [(p.node, p.role, p.consumers) for p in placements] == [("x", "q", (("reshape", 0),))]
    with torch.no_grad():
        unit = copy.deepcopy(unit)
        unit.x.weight *= 2
        unit.x.bias *= 2
    assert torch.equal(gm(a), unit(a))


def test_describe_shows_sites_before_and_quantizers_after_preparation(tiny_sam):
    before = {name: type(m) for name, m in tiny_sam.named_modules()}
    planned = describe(tiny_sam)
    assert {name: type(m) for name, m in tiny_sam.named_modules()} == before
    assert {row.quantizer for row in planned} == {"-"}
    name = "image_encoder.blocks.0"
    gm = trace_unit(tiny_sam.get_submodule(name), name)
    place(gm, lambda role, site: Record(), lambda layer, name: Record(bits=3, ch_axis=0))
    tiny_sam.image_encoder.blocks[0] = gm
    prepared = describe(tiny_sam)
    assert [row.node for row in prepared] == [row.node for row in planned if row.unit == name]
    assert {row.quantizer for row in prepared} == {"Record 4 bit", "Record 3 bit, per channel"}
    lines = str(prepared).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["unit", "tensor", "role", "quantizer"]
    assert len(lines) == len(prepared) + 3 and len({line.index("|") for line in lines if "|" in line}) == 1
    assert any("norm2 -> mlp.lin1" in line and "mlp_in" in line for line in lines)


def test_describe_counts_every_weight_once(tiny_sam):
    planned = describe(tiny_sam)
    outside = sum(count for _, count in planned.outside)
    assert planned.quantized + planned.in_units + outside == sum(p.numel() for p in tiny_sam.parameters())
    assert [count for _, count in planned.outside] == sorted((c for _, c in planned.outside), reverse=True)
    assert "image_encoder.patch_embed.proj" in dict(planned.outside)
    prepared = describe(prepare(tiny_sam, Recipe.from_config("ahcq")))
    assert (prepared.quantized, prepared.in_units, prepared.outside) == planned_numbers(planned)
    coverage = cover(tiny_sam)
    assert prepared.quantized == sum(part.weights for part in coverage.parts if part.kind == INTEGERS)
    assert outside == sum(part.weights for part in coverage.parts if part.kind == OUTSIDE)
    share = prepared.quantized / sum(part.weights for part in coverage.parts)
    assert str(prepared).splitlines()[-1].startswith(f"of the weights {share:.2%} are quantized, ")


def planned_numbers(table):
    return table.quantized, table.in_units, table.outside
