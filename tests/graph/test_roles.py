# SPDX-License-Identifier: Apache-2.0
"""Roles pinned for SAM-B, SAM-L and a timm ViT, and found by structure in modules with odd names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import describe, find_roles, find_units, find_weight_layers, trace_unit
from tests.graph.conftest import role_counts

ATTENTION = {"q": 1, "k": 1, "v": 1, "softmax": 1, "attn_out": 1}
ENCODER_BLOCK = {"qkv_in": 1, **ATTENTION, "mlp_in": 1, "post_act": 1, "weight": 4}
NECK = {"conv_in": 2, "weight": 2}
TWO_WAY = {"q": 3, "k": 3, "v": 3, "softmax": 3, "attn_out": 3, "mlp_in": 1, "post_act": 1, "weight": 14}
DECODER = {
    "mask_decoder.transformer.layers.0": {"qkv_in": 7, **TWO_WAY},
    "mask_decoder.transformer.layers.1": {"qkv_in": 8, **TWO_WAY},
    "mask_decoder.transformer.final_attn_token_to_image": {"qkv_in": 3, **ATTENTION, "weight": 4},
}


def sam_counts(depth: int) -> dict[str, dict[str, int]]:
    blocks = {f"image_encoder.blocks.{i}": ENCODER_BLOCK for i in range(depth)}
    return {**blocks, "image_encoder.neck": NECK, **DECODER}


def order(model: nn.Module, unit: str) -> list[tuple[str, ...]]:
    """(role, *layers) of the activation sites in graph order."""
    return [(row.role, *row.layers) for row in describe(model, unit) if row.role != "weight"]


def test_role_counts_of_sam_b_and_sam_l(sam_b, sam_l):
    assert role_counts(sam_b) == sam_counts(12)
    assert role_counts(sam_l) == sam_counts(24)


def test_role_counts_of_a_timm_vit(vit_tiny):
    assert role_counts(vit_tiny) == {f"blocks.{i}": ENCODER_BLOCK for i in range(12)}


@pytest.mark.parametrize("unit", ["image_encoder.blocks.0", "image_encoder.blocks.2"], ids=["windows", "global"])
def test_placement_order_of_a_sam_encoder_block(sam_b, unit):
    assert order(sam_b, unit) == [
        ("qkv_in", "attn.qkv"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "attn.proj"),
        ("mlp_in", "mlp.lin1"),
        ("post_act", "mlp.lin2"),
    ]


def test_placement_order_of_a_timm_block(vit_tiny):
    assert order(vit_tiny, "blocks.0") == [
        ("qkv_in", "attn.qkv"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "attn.proj"),
        ("mlp_in", "mlp.fc1"),
        ("post_act", "mlp.fc2"),
    ]


def test_placement_order_of_the_sam_decoder(sam_b):
    layer, t2i, i2t = "mask_decoder.transformer.layers", "cross_attn_token_to_image", "cross_attn_image_to_token"
    from_image_keys = [
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "self_attn.out_proj"),
        ("qkv_in", f"{t2i}.q_proj"),
        ("qkv_in", f"{t2i}.k_proj"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", f"{t2i}.out_proj"),
        ("mlp_in", "mlp.lin1"),
        ("post_act", "mlp.lin2"),
        ("qkv_in", f"{i2t}.v_proj"),
        ("qkv_in", f"{i2t}.k_proj"),  # queries + query_pe is computed before keys + key_pe
        ("qkv_in", f"{i2t}.q_proj"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", f"{i2t}.out_proj"),
    ]
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    keys = ("qkv_in", f"{t2i}.v_proj")
    assert order(sam_b, f"{layer}.0") == [("qkv_in", *projections), keys, *from_image_keys]
    assert order(sam_b, f"{layer}.1") == [
        ("qkv_in", projections[2]),
        keys,
        ("qkv_in", *projections[:2]),
        *from_image_keys,
    ]
    assert order(sam_b, "mask_decoder.transformer.final_attn_token_to_image") == [
        ("qkv_in", "q_proj"),
        ("qkv_in", "k_proj"),
        ("qkv_in", "v_proj"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "out_proj"),
    ]
    assert order(sam_b, "image_encoder.neck") == [("conv_in", "0"), ("conv_in", "2")]


@pytest.mark.parametrize("model", ["sam_b", "vit_tiny"])
def test_every_layer_input_and_attention_factor_belongs_to_exactly_one_site(request, model):
    model = request.getfixturevalue(model)
    for name in find_units(model):
        gm = trace_unit(model.get_submodule(name), name)
        sites = find_roles(gm)
        layers = [layer for site in sites for layer in site.layers]
        assert sorted(layers) == sorted(find_weight_layers(gm))
        edges = [edge for site in sites for edge in site.consumers]
        assert len(edges) == len(set(edges))
        assert len({(site.node, site.role) for site in sites}) == len(sites)


def test_sam_q_is_quantized_before_scaling_and_for_the_position_bias_too(sam_b):
    gm = trace_unit(sam_b.image_encoder.blocks[0], "image_encoder.blocks.0")
    (site,) = (s for s in find_roles(gm) if s.role == "q")
    names = [getattr(node.target, "__name__", node.target) for node, _ in site.consumers]
    assert names == ["mul", "add_decomposed_rel_pos"]
    assert [key for _, key in site.consumers] == [0, 1]


class Odd(nn.Module):
    """Attention and MLP whose names and spelling give nothing away; the options choose among spellings."""

    def __init__(self, softmax: str = "method", norm: bool = False, rotate: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(8, 8) for _ in range(6))
        self.g = nn.Softmax(dim=-1)
        self.h = nn.LayerNorm(8) if norm else nn.Identity()
        self.softmax, self.rotate = softmax, rotate
        self.i = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.h(self.a(x)), self.b(x), self.c(x)
        if self.rotate:
            q = q * torch.cos(q.mean()) + q.roll(1, -1)
        scores = torch.bmm(q * 0.5, k.mT / q.shape[-1]) if self.softmax != "method" else q @ k.transpose(1, 2)
        if self.softmax == "method":
            weights = scores.softmax(-1)
        else:
            weights = self.g(scores) if self.softmax == "module" else F.softmax(scores, dim=-1)
        x = x + self.d(self.i(weights) @ v)
        return x + self.f(F.relu(self.e(x)))


ODD_LAYERS = {"a": "qkv_in", "b": "qkv_in", "c": "qkv_in", "d": "attn_out", "e": "mlp_in", "f": "post_act"}


@pytest.mark.parametrize(
    "options", [{}, {"softmax": "module"}, {"softmax": "function"}, {"norm": True}, {"rotate": True}]
)
def test_roles_do_not_depend_on_names_or_spelling(options):
    sites = find_roles(trace_unit(Odd(**options), "odd"))
    assert {layer: site.role for site in sites for layer in site.layers} == ODD_LAYERS
    assert [len([s for s in sites if s.role == role]) for role in ("q", "k", "v", "softmax")] == [1, 1, 1, 1]
    by_role = {site.role: site.node for site in sites}
    assert by_role["k"].target == "b" and by_role["v"].target == "c"  # right after the projection
    # After the last operation that is more than a change of shape or a scalar factor.
    expected = "h" if options.get("norm") else "add" if options.get("rotate") else "a"
    assert getattr(by_role["q"].target, "__name__", by_role["q"].target) == expected


def test_parameters_of_one_tensor_in_two_roles_are_kept_apart():
    class Parallel(Odd):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.a(x), self.b(x), self.c(x)
            return self.d((q @ k.transpose(1, 2)).softmax(-1) @ v) + self.f(F.relu(self.e(x)))

    sites = find_roles(trace_unit(Parallel(), "parallel"))
    assert [(s.role, s.layers) for s in sites if s.node.op == "placeholder"] == [
        ("qkv_in", ("a", "b", "c")),
        ("mlp_in", ("e",)),
    ]


def test_unprojected_arguments_are_quantized_towards_the_attention_only():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            weights = (self.q(x) @ memory.transpose(1, 2)).softmax(-1)
            return memory.mean(1, keepdim=True) + self.out(weights @ memory)

    sites = {s.role: s for s in find_roles(trace_unit(Pool(), "pool"))}
    assert sites["k"].node is sites["v"].node and sites["k"].node.name == "memory"
    assert [n.name for n, _ in sites["k"].consumers] == ["transpose"]
    assert [n.name for n, _ in sites["v"].consumers] == ["matmul_1"]


class Einsum(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bqc,bkc->bqk", self.a(x), self.b(x)).softmax(-1) @ self.c(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (Einsum(), "attention by einsum"),
        (Functional(), "calls linear on a bare weight"),
        (Packed(), "nn.MultiheadAttention 'attention' hides.*add_zero_attn"),
    ],
)
def test_what_would_silently_stay_in_floating_point_is_refused(unit, reason):
    with pytest.raises(ValueError, match=rf"unit 'blocks.7'.*{reason}.*`units=`"):
        find_roles(trace_unit(unit, "blocks.7"))


def test_products_outside_attention_are_refused_unless_left():
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(1, 2)

    with pytest.raises(ValueError, match=r"'gram'.*matmul: a product of two tensors.*test_roles\.py:\d+.*`leave=`"):
        find_roles(trace_unit(Gram(), "gram"))
    assert find_roles(trace_unit(Gram(), "gram", leave=["matmul"])) == []
