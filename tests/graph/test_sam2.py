# SPDX-License-Identifier: Apache-2.0
"""SAM 2's blocks: which are units, what their tensors are, and that tracing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ahcq_plugin.graph import describe, find_units, trace_unit
from ahcq_plugin.graph.untraceable import rotate, treatment
from tests.graph.conftest import role_counts

pytest.importorskip("sam2")
from sam2.modeling.position_encoding import apply_rotary_enc, compute_axial_cis
from sam2.modeling.sam.transformer import RoPEAttention

DECODER = "sam_mask_decoder.transformer"
UNITS = [
    *(f"image_encoder.trunk.blocks.{i}" for i in range(5)),
    *(f"image_encoder.neck.convs.{i}" for i in range(4)),
    "memory_attention.layers.0",
    "memory_attention.layers.1",
    "memory_encoder",
    f"{DECODER}.layers.0",
    f"{DECODER}.layers.1",
    f"{DECODER}.final_attn_token_to_image",
]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def roles(model: nn.Module, unit: str) -> list[tuple[str, ...]]:
    """(role, *layers) of the activation sites in graph order."""
    return [(row.role, *row.layers) for row in describe(model, unit) if row.role != "weight"]


def test_units(small_sam2):
    assert find_units(small_sam2) == UNITS


def test_units_of_a_published_size():
    from ahcq_plugin.zoo.sam2 import build_sam2

    units = find_units(build_sam2({"name": "sam2.1_t", "image_size": 64}, checkpoint=False))
    blocks = [f"image_encoder.trunk.blocks.{i}" for i in range(12)]
    layers = [f"memory_attention.layers.{i}" for i in range(4)]
    assert units == [*blocks, *UNITS[5:9], *layers, *UNITS[-4:]]


def test_roles_of_a_hiera_block_with_windows(small_sam2):
    assert roles(small_sam2, "image_encoder.trunk.blocks.0") == [
        ("qkv_in", "attn.qkv"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "attn.proj"),
        ("mlp_in", "mlp.layers.0"),
        ("post_act", "mlp.layers.1"),
    ]
    assert roles(small_sam2, "image_encoder.trunk.blocks.3") == roles(small_sam2, "image_encoder.trunk.blocks.0")


def test_roles_of_a_hiera_block_that_pools_its_queries(small_sam2):
    """The pooled queries are what enters the matmul; the shortcut has a projection of its own."""
    name = "image_encoder.trunk.blocks.1"
    assert roles(small_sam2, name) == [
        ("other_in", "proj"),
        ("qkv_in", "attn.qkv"),
        ("k",),
        ("v",),
        ("q",),
        ("softmax",),
        ("attn_out", "attn.proj"),
        ("mlp_in", "mlp.layers.0"),
        ("post_act", "mlp.layers.1"),
    ]
    assert [row.node for row in describe(small_sam2, name) if row.role == "q"] == ["pool_1"]


def test_roles_of_a_memory_attention_layer(small_sam2):
    """Queries and keys are quantized after their rotation."""
    assert roles(small_sam2, "memory_attention.layers.0") == [
        ("qkv_in", "cross_attn_image.v_proj"),
        ("qkv_in", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("v",),
        ("q",),
        ("k",),
        ("softmax",),
        ("attn_out", "self_attn.out_proj"),
        ("qkv_in", "cross_attn_image.q_proj"),
        ("qkv_in", "cross_attn_image.k_proj"),
        ("v",),
        ("q",),
        ("k",),
        ("softmax",),
        ("attn_out", "cross_attn_image.out_proj"),
        ("mlp_in", "linear1"),
        ("post_act", "linear2"),
    ]
    traced = trace_unit(small_sam2.memory_attention.layers[0], "layer")
    rotations = [node for node in traced.graph.nodes if node.target is rotate]
    sources = {user for node in rotations for user in node.users}
    found = {row.node for row in describe(small_sam2, "memory_attention.layers.0") if row.role in ("q", "k")}
    assert len(rotations) == 2 and {node.name for node in sources} == found


def test_roles_of_the_memory_encoder_and_the_pyramid(small_sam2):
    block = [("conv_in", "dwconv"), ("mlp_in", "pwconv1"), ("post_act", "pwconv2")]
    assert roles(small_sam2, "memory_encoder") == [
        *(("conv_in", f"mask_downsampler.encoder.{i}") for i in (0, 3, 6, 9, 12)),
        ("conv_in", "pix_feat_proj"),
        *((role, f"fuser.layers.{i}.{layer}") for i in range(2) for role, layer in block),
        ("conv_in", "out_proj"),
    ]
    assert roles(small_sam2, "image_encoder.neck.convs.2") == [("conv_in", "conv")]


def test_roles_of_the_decoder(small_sam2):
    counts = role_counts(small_sam2)
    attention = {"q": 3, "k": 3, "v": 3, "softmax": 3, "attn_out": 3}
    shared = {**attention, "mlp_in": 1, "post_act": 1, "weight": 14}
    assert counts[f"{DECODER}.layers.0"] == {"qkv_in": 7, **shared}
    assert counts[f"{DECODER}.layers.1"] == {"qkv_in": 8, **shared}
    assert roles(small_sam2, f"{DECODER}.final_attn_token_to_image") == [
        ("qkv_in", "q_proj"),
        ("qkv_in", "k_proj"),
        ("qkv_in", "v_proj"),
        ("q",),
        ("k",),
        ("v",),
        ("softmax",),
        ("attn_out", "out_proj"),
    ]


@pytest.mark.parametrize("block", range(5))
def test_hiera_blocks_are_equal_for_every_input_size(small_sam2, block):
    original = small_sam2.image_encoder.trunk.blocks[block]
    traced = trace_unit(original, "block")
    for height, width in ((8, 8), (10, 6)):
        x = rand(2, height, width, original.dim)
        torch.testing.assert_close(traced(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frames", "pointers"), [(1, 0), (1, 4), (3, 8)])
def test_memory_attention_is_equal_for_every_memory(small_sam2, frames, pointers):
    original = small_sam2.memory_attention.layers[0]
    traced = trace_unit(original, "layer")
    count = 16 * frames + pointers
    arguments = {
        "tgt": rand(1, 16, 32),
        "memory": rand(1, count, 16, seed=2),
        "pos": rand(1, count, 16, seed=3),
        "query_pos": rand(1, 16, 32, seed=4),
        "num_k_exclude_rope": pointers,
    }
    torch.testing.assert_close(traced(**arguments), original(**arguments), rtol=1e-5, atol=1e-5)


def test_memory_encoder_is_bit_exact_and_refuses_the_other_sigmoid(small_sam2):
    original = small_sam2.memory_encoder
    traced = trace_unit(original, "memory_encoder")
    arguments = {"pix_feat": rand(1, 32, 4, 4), "masks": rand(1, 1, 64, 64), "skip_mask_sigmoid": True}
    got, expected = traced(**arguments), original(**arguments)
    assert torch.equal(got["vision_features"], expected["vision_features"])
    assert torch.equal(got["vision_pos_enc"][0], expected["vision_pos_enc"][0])
    with pytest.raises(ValueError, match="`skip_mask_sigmoid` was fixed to True when this unit was traced, got False"):
        traced(arguments["pix_feat"], arguments["masks"])


@pytest.mark.parametrize(("frames", "unrotated"), [(1, 0), (1, 3), (4, 5), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotation_equals_the_package(frames, unrotated, dtype):
    q, k = rand(2, 3, 9, 8).to(dtype), rand(2, 3, 9 * frames + unrotated, 8, seed=2).to(dtype)
    table = compute_axial_cis(dim=8, end_x=3, end_y=3, theta=500.0)
    turned_q, turned_k = apply_rotary_enc(q, k[:, :, : 9 * frames], freqs_cis=table, repeat_freqs_k=True)
    got_q, got_k = rotate(q, k, unrotated, theta=500.0, repeat=True)
    assert got_q.dtype == got_k.dtype == dtype
    assert torch.equal(got_q, turned_q)
    assert torch.equal(got_k, torch.cat([turned_k, k[:, :, 9 * frames :]], dim=2))


def test_rotation_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="need a square grid, got 8 queries"):
        rotate(rand(1, 1, 8, 4), rand(1, 1, 8, 4), 0, 100.0, True)
    with pytest.raises(ValueError, match="18 keys with a position do not fit a grid of 9"):
        rotate(rand(1, 1, 9, 4), rand(1, 1, 18, 4), 0, 100.0, repeat=False)
    with pytest.raises(ValueError, match="10 keys with a position do not fit a grid of 9"):
        rotate(rand(1, 1, 9, 4), rand(1, 1, 13, 4), 3, 100.0, repeat=True)


def test_rotations_can_be_learned_through_after_inference_mode():
    q = rand(1, 1, 25, 4)
    with torch.inference_mode():
        rotate(q, q, 0, 77.0, True)
    q.requires_grad_()
    sum(t.square().sum() for t in rotate(q, q, 0, 77.0, True)).backward()
    assert torch.isfinite(q.grad).all() and q.grad.any()


def test_what_stands_for_a_rotary_attention_is_one_for_isinstance_also_in_copies(small_sam2):
    traced = trace_unit(small_sam2.memory_attention.layers[0], "layer")
    for each in (traced, copy.deepcopy(traced)):
        assert isinstance(each.cross_attn_image, RoPEAttention) and isinstance(each.self_attn, RoPEAttention)
        assert set(each.state_dict()) == set(small_sam2.memory_attention.layers[0].state_dict())


def test_a_class_that_only_shares_the_name_is_none_of_the_known_ones():
    class RoPEAttention(nn.Module):
        def forward(self, q, k, v):
            return q

    class MemoryEncoder(nn.Module):
        def forward(self, x):
            return x

    assert treatment(RoPEAttention()) == treatment(MemoryEncoder()) == treatment(nn.Identity())


def test_every_parameter_of_every_unit_gets_a_finite_gradient(small_sam2, small_clips):
    from torch.utils import _pytree as pytree

    from ahcq_plugin.ptq import Recipe, calibrate, prepare, set_quantization
    from ahcq_plugin.ptq.stream import UnitStream
    from ahcq_plugin.zoo.track import clip_forward

    prepare(small_sam2, Recipe.from_config("qdrop", w_bits=4, a_bits=4))
    calibrate(small_sam2, small_clips, clip_forward, progress=False)
    stream = UnitStream(small_sam2, small_clips, clip_forward)
    for name in stream.order:
        stream.collect(name)
        unit = stream.units[name]
        set_quantization(unit, False, True)
        args, kwargs = stream.inputs("quantized", len(stream.samples) - 1)
        leaves = [leaf for leaf in pytree.tree_leaves(unit(*args, **kwargs)) if leaf.requires_grad]
        weights = torch.linspace(0.5, 1.5, 7)
        loss = sum((leaf * weights.repeat(leaf.numel())[: leaf.numel()].view_as(leaf)).sum() for leaf in leaves)
        loss.backward()
        for path, parameter in unit.named_parameters():
            if path.endswith(("zero_point", "alpha")) or not parameter.requires_grad:
                continue
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), f"{name}.{path}"
        weights_with_gradient = [p for path, p in unit.named_parameters() if path.endswith("weight") and p.ndim > 1]
        assert weights_with_gradient and all(p.grad.any() for p in weights_with_gradient), name
        stream.advance(name)
