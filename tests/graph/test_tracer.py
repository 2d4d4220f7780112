# SPDX-License-Identifier: Apache-2.0
"""Tracing changes nothing: outputs, state-dict keys, the traced module itself."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import BlockTracer, trace_unit

sam_encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
sam_transformer = pytest.importorskip("segment_anything.modeling.transformer")


def encoder_block(window_size: int) -> nn.Module:
    return sam_encoder.Block(
        dim=16, num_heads=2, mlp_ratio=2, use_rel_pos=True, window_size=window_size, input_size=(7, 7)
    )


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window_size", [0, 3], ids=["global", "windows-with-padding"])
def test_encoder_block_is_bit_exact_for_every_batch_size(randomized, window_size):
    block = randomized(encoder_block(window_size))
    traced = trace_unit(block, "blocks.0")
    for batch in (1, 3):
        x = rand(batch, 7, 7, 16, seed=batch)
        assert torch.equal(traced(x), block(x))


def test_windowed_block_is_bit_exact_for_another_image_size(randomized):
    block = randomized(encoder_block(3))
    traced = trace_unit(block, "blocks.0")
    for height, width in ((6, 6), (5, 8)):
        x = rand(2, height, width, 16)
        assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("skip_first_layer_pe", [True, False])
def test_two_way_block_is_bit_exact_for_every_token_count(randomized, skip_first_layer_pe):
    block = randomized(sam_transformer.TwoWayAttentionBlock(16, 2, 24, skip_first_layer_pe=skip_first_layer_pe))
    traced = trace_unit(block, "layers.0")
    for batch, tokens, pixels in ((1, 7, 12), (4, 3, 9)):
        queries, query_pe = rand(batch, tokens, 16), rand(batch, tokens, 16, seed=2)
        keys, key_pe = rand(batch, pixels, 16, seed=3), rand(batch, pixels, 16, seed=4)
        arguments = {"queries": queries, "keys": keys, "query_pe": query_pe, "key_pe": key_pe}
        for got, expected in zip(traced(**arguments), block(**arguments), strict=True):
            assert torch.equal(got, expected)


def test_attention_and_neck_are_bit_exact(randomized):
    attention = randomized(sam_transformer.Attention(16, 2, downsample_rate=2))
    q, k, v = rand(2, 3, 16), rand(2, 5, 16, seed=2), rand(2, 5, 16, seed=3)
    assert torch.equal(trace_unit(attention, "final")(q=q, k=k, v=v), attention(q=q, k=k, v=v))
    encoder = sam_encoder.ImageEncoderViT(img_size=16, patch_size=8, embed_dim=8, depth=0, num_heads=1, out_chans=4)
    neck = randomized(encoder.neck)
    x = rand(2, 8, 5, 4)
    assert torch.equal(trace_unit(neck, "neck")(x), neck(x))


def test_timm_block_is_equal_up_to_rounding(vit_tiny):
    traced = trace_unit(vit_tiny.blocks[0], "blocks.0")
    for batch, tokens in ((1, 197), (3, 10)):
        x = rand(batch, tokens, 192)
        assert (traced(x) - vit_tiny.blocks[0](x)).abs().max() < 1e-5


def test_copied_window_functions_are_found_in_the_defining_module(randomized):
    """MobileSAM and others copy the classes of segment_anything into modules of their own."""
    module = types.ModuleType("copied_encoder")
    source = inspect.getsource(sam_encoder).replace("from .common", "from segment_anything.modeling.common")
    exec(compile(source, "copied_encoder.py", "exec"), module.__dict__)
    block = randomized(module.Block(dim=16, num_heads=2, use_rel_pos=True, window_size=3, input_size=(7, 7)))
    tracer = BlockTracer()
    tracer.trace(encoder_block(3).eval())  # the same tracer serves several modules
    graph = tracer.trace(block)
    assert module.window_partition in {node.target for node in graph.nodes}
    x = rand(1, 7, 7, 16)
    assert torch.equal(fx.GraphModule(block, graph)(x), block(x))


class Holder(nn.Module):
    """Tensors that fx drops or makes persistent: unused parameter, non-persistent buffers, plain tensor, constant."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.child = nn.Module()
        self.child.extra = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.register_buffer("kept", torch.zeros(4))
        self.plain = torch.full((4,), 2.0)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.used(x) + self.table + self.kept + self.plain + torch.ones(4) * torch.tensor(2.0))


def test_state_dict_keys_and_parameters_are_those_of_the_unit():
    unit = Holder()
    attributes, flags = set(vars(unit)), [m.training for m in unit.modules()]
    traced = trace_unit(unit, "unit")
    assert set(traced.state_dict()) == set(unit.state_dict())
    assert traced.used.weight is unit.used.weight and traced.child.extra is unit.child.extra
    assert set(vars(unit)) == attributes and [m.training for m in unit.modules()] == flags
    x = rand(2, 4)
    assert torch.equal(traced.eval()(x), unit.eval()(x))
    fresh = trace_unit(Holder(), "unit")
    fresh.load_state_dict(traced.state_dict())
    assert torch.equal(fresh.eval()(x), unit(x))


def test_meta_names_the_unit_and_survives_deepcopy(randomized):
    traced = trace_unit(randomized(encoder_block(3)), "blocks.5")
    assert traced.meta["ahcq_unit"] == {"name": "blocks.5", "leave": (), "call": None, "placements": []}
    twin = copy.deepcopy(traced)
    assert twin.meta["ahcq_unit"]["name"] == "blocks.5"
    x = rand(1, 7, 7, 16)
    assert torch.equal(twin(x), traced(x))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, gain: float = 2.0) -> Tensor:
        x = self.linear(x) * gain
        return x if mask is None else x + mask


def test_arguments_with_a_default_are_fixed_and_checked():
    unit = Optional().eval()
    traced = trace_unit(unit, "unit")
    x = rand(2, 4)
    assert torch.equal(traced(x), unit(x)) and torch.equal(traced(x, mask=None, gain=2.0), unit(x))
    with pytest.raises(ValueError, match=r"`mask` was fixed to its default None.*got Tensor.*`units=`"):
        traced(x, mask=x)
    with pytest.raises(ValueError, match="`gain` was fixed to its default 2.0"):
        traced(x, gain=3.0)


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        assert tokens == 4 * batch, "wrong size"
        return x + 1


def test_assertions_about_sizes_are_taken_to_hold():
    assert torch.equal(trace_unit(Asserting(), "unit")(torch.zeros(1, 4, 2)), torch.ones(1, 4, 2))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_names_unit_file_line_and_way_out():
    line = inspect.getsourcelines(Branching.forward)[1] + 1
    with pytest.raises(RuntimeError) as caught:
        trace_unit(Branching(), "encoder.blocks.3")
    message = str(caught.value)
    assert "unit 'encoder.blocks.3' (Branching)" in message
    assert f"{__file__}:{line}: `if x.sum() > 0:`" in message
    assert "control flow" in message and "`units=`" in message and "\n" not in message
