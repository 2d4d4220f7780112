# SPDX-License-Identifier: Apache-2.0
"""Linear functions on parameters, and nn.MultiheadAttention, become layers that read those parameters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import find_roles, find_weight_layers, trace_unit
from ahcq_plugin.quantizers.layers import LinearView, held_weight

WIDTH = 8


@pytest.fixture(autouse=True)
def slow_path():
    """The fused kernel for a whole nn.MultiheadAttention rounds in another order."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Attention(nn.Module):
    """Calls nn.MultiheadAttention; ``inputs``: for each of query, key and value, which argument it is."""

    def __init__(self, inputs: str = "xxx", call: dict | None = None, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, **options)
        self.inputs, self.call = inputs, call or {}

    def forward(self, x, y, z):  # bare: fx cannot pickle annotations that are strings
        return self.attn(*({"x": x, "y": y, "z": z}[name] for name in self.inputs), **self.call)


def arguments(batched: bool = True) -> list[Tensor]:
    """Batch first: 4 items of 4 tokens, so that either order of dimensions fits masks."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*([4] * (2 if batched else 1)), WIDTH, generator=generator) for _ in range(3)]


FORBID = torch.ones(4, 4, dtype=torch.bool).triu(1)
CASES = {
    "self": ({}, {}),
    "batch first": ({}, {"batch_first": True}),
    "no bias": ({}, {"bias": False}),
    "no weights": ({"call": {"need_weights": False}}, {"batch_first": True}),
    "weights by head": ({"call": {"average_attn_weights": False}}, {}),
    "queries and keys are one": ({"inputs": "xxy"}, {}),
    "keys and values are one": ({"inputs": "xyy"}, {"batch_first": True}),
    "all differ": ({"inputs": "xyz"}, {}),
    "separate weights": ({"inputs": "xyz"}, {"kdim": WIDTH, "vdim": WIDTH}),
    "bool mask": ({"call": {"attn_mask": FORBID}}, {}),
    "causal": ({"call": {"attn_mask": FORBID, "is_causal": True, "need_weights": False}}, {}),
    "float mask": ({"call": {"attn_mask": torch.linspace(-2, 2, 16).view(4, 4)}}, {}),
    "mask by head": ({"call": {"attn_mask": torch.linspace(-2, 2, 128).view(8, 4, 4)}}, {"batch_first": True}),
    "padding": ({"call": {"key_padding_mask": FORBID}}, {"batch_first": True}),
}


def unit_of(case: str) -> Attention:
    torch.manual_seed(0)
    (own, options) = CASES[case]
    unit = Attention(**own, **options).eval()
    if case == "separate weights":  # PyTorch packs them where all widths are equal
        unit.attn = nn.MultiheadAttention(WIDTH, 2, kdim=WIDTH, vdim=WIDTH + 4).eval()
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return unit


@pytest.mark.parametrize("case", CASES)
def test_attention_written_out_equals_the_module(case):
    unit, tensors = unit_of(case), arguments()
    if case == "separate weights":
        tensors[2] = torch.cat([tensors[2], tensors[2][..., :4]], -1)
    traced = trace_unit(unit, case)
    (out, weights), (expected, expected_weights) = traced(*tensors), unit(*tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-6)
    assert sorted(traced.state_dict()) == sorted(unit.state_dict())
    assert sorted(name for name, _ in traced.named_parameters()) == sorted(name for name, _ in unit.named_parameters())
    assert not any(isinstance(module, nn.MultiheadAttention) for module in traced.modules())


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_without_a_batch(batch_first):
    unit = Attention(batch_first=batch_first).eval()
    tensors = arguments(batched=False)
    torch.testing.assert_close(trace_unit(unit, "unit")(*tensors)[0], unit(*tensors)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("self", ["in_proj"]),
        ("queries and keys are one", ["in_proj_0_16", "in_proj_16_24"]),
        ("keys and values are one", ["in_proj_0_8", "in_proj_8_24"]),
        ("all differ", ["in_proj_0_8", "in_proj_8_16", "in_proj_16_24"]),
        ("separate weights", ["q_proj", "k_proj", "v_proj"]),
    ],
)
def test_projections_are_layers_in_the_roles_of_attention(case, layers):
    traced = trace_unit(unit_of(case), "unit")
    names = [f"attn.{name}" for name in layers]
    assert find_weight_layers(traced) == [*names, "attn.out_proj"]
    roles = [(site.role, layer) for site in find_roles(traced) for layer in site.layers]
    assert sorted(roles) == sorted([*(("qkv_in", name) for name in names), ("attn_out", "attn.out_proj")])
    assert sorted(site.role for site in find_roles(traced) if not site.layers) == ["k", "q", "softmax", "v"]


def test_a_causal_hint_without_a_mask_is_refused():
    with pytest.raises(RuntimeError, match=r"unit 'x'.*`is_causal` needs an `attn_mask`"):
        trace_unit(Attention(call={"is_causal": True}), "x")


@pytest.mark.parametrize("mask", [torch.ones(4, 4, dtype=torch.int64)])
def test_a_mask_of_integers_is_refused(mask):
    unit = Attention(call={"attn_mask": mask}).eval()
    with pytest.raises(TypeError, match="bool or floating point, got torch.int64"):
        trace_unit(unit, "unit")(*arguments())


def test_averaged_weights_that_nothing_uses_are_not_computed():
    class Output(Attention):
        def forward(self, x):
            return self.attn(x, x, x)[0]

    assert "mean" not in {node.target for node in trace_unit(Output(), "unit").graph.nodes}
    assert "mean" in {node.target for node in trace_unit(Attention(), "unit").graph.nodes}


class ClipPool(nn.Module):
    """CLIP's attention pool: the function of attention on the weights of four Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=2, in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]), bias_k=None, bias_v=None,
            add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.out.weight, out_proj_bias=self.out.bias,
            use_separate_proj_weight=True, training=False, need_weights=False, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0]  # fmt: skip


def test_the_function_of_attention_equals_itself_written_out():
    unit, x = ClipPool().eval(), arguments()[0]
    traced = trace_unit(unit, "pool")
    torch.testing.assert_close(traced(x), unit(x), rtol=0, atol=1e-6)
    assert sorted(traced.state_dict()) == sorted(unit.state_dict())
    roles = {layer: site.role for site in find_roles(traced) for layer in site.layers}
    assert roles == {"q.linear": "qkv_in", "k.linear": "qkv_in", "v.linear": "qkv_in", "out": "attn_out"}


class Separate(nn.Module):
    """A bias put together of parts, as in BEiT; a matrix of its own; a Linear whose bias is passed along."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.plain = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ParameterList([torch.randn(WIDTH // 2), torch.randn(WIDTH // 2)])
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, weight=self.qkv.weight, bias=torch.cat((self.parts[0], self.parts[1])))
        x = F.linear(x, self.plain.weight, self.plain.bias)
        return F.linear(F.linear(x, self.weight, self.bias), self.weight, self.bias)


class WithoutItsBias(Separate):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain.weight) + F.linear(x, self.plain.weight, self.bias)


def test_functional_linears_become_layers():
    unit = Separate().eval()
    traced = trace_unit(unit, "unit")
    assert find_weight_layers(traced) == ["qkv", "plain", "linear"]
    assert type(traced.qkv) is nn.Linear and type(traced.linear) is LinearView and traced.linear.bias is unit.bias
    x = arguments()[0]
    torch.testing.assert_close(traced(x), unit(x), rtol=1e-6, atol=1e-6 * float(unit(x).detach().abs().max()))
    assert not {n.target for n in traced.graph.nodes} & {F.linear, "weight", "qkv.weight"}
    assert "weight" not in dict(unit.named_children()) and not hasattr(unit, "linear")


def test_a_linear_called_without_its_bias_is_read_beside_it():
    unit = WithoutItsBias().eval()
    traced = trace_unit(unit, "unit")
    assert find_weight_layers(traced) == ["plain.linear"] and traced.get_submodule("plain.linear").bias is None
    torch.testing.assert_close(traced(arguments()[0]), unit(arguments()[0]), rtol=1e-6, atol=1e-6)


class Overlapping(Separate):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:6]).sum() + F.linear(x, self.weight[4:]).sum()


class CalledToo(Separate):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + F.linear(x, self.plain.weight)


class Tied(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(x) + F.linear(x, self.plain.weight)


class ReadToo(Separate):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + x @ self.weight


@pytest.mark.parametrize("kind", [Overlapping, CalledToo, Tied, ReadToo])
def test_a_matrix_that_two_would_quantize_is_refused(kind):
    with pytest.raises(ValueError, match=r"unit 'blocks\.3'.*(bare weight|not read by a quantized Linear)"):
        find_roles(trace_unit(kind(), "blocks.3"))


@pytest.mark.parametrize("case", ["self", "all differ"])
def test_copies_pickles_and_casts_keep_the_sharing(case):
    traced = trace_unit(unit_of(case), "unit")
    stored = io.BytesIO()
    torch.save(traced, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(traced), torch.load(stored, weights_only=False), copy.deepcopy(traced).double()):
        parameters = dict(copied.named_parameters())
        for name, layer in copied.named_modules():
            if isinstance(layer, LinearView):
                held, rows = held_weight(name, layer)
                assert layer.weight.data_ptr() == parameters[held][rows].data_ptr()
                assert layer.weight.data_ptr() != traced.get_submodule(name).weight.data_ptr()
                with torch.no_grad():
                    layer.weight.fill_(3.0)
                assert bool((parameters[held][rows] == 3).all())
