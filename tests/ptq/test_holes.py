# SPDX-License-Identifier: Apache-2.0
"""What would stay in floating point unseen: refused by name before anything is computed, or found by the audit."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer

from ahcq_plugin import quantize
from ahcq_plugin.graph import find_weight_layers
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS, OUTSIDE, cover

WIDTH = 16


class Block(nn.Module):
    """Attention and MLP with norms; ``extra`` is one more operation, which each test chooses."""

    def __init__(self, extra: nn.Module | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lin1, self.lin2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.extra = nn.Identity() if extra is None else extra

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return self.extra(x + self.lin2(F.gelu(self.lin1(self.norm2(x)))))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.head, self.blocks = nn.Linear(WIDTH, 4), nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AddMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight.t()).view_as(x)


class Einsum(AddMM):
    def forward(self, x):
        return torch.einsum("bnc,dc->bnd", x, self.weight)


class MatmulWeight(AddMM):
    def forward(self, x):
        return x @ self.weight


class WeightByGate(AddMM):
    """Element by element, and yet a matrix of weights: a diagonal of a larger product may hide so."""

    def forward(self, x):
        return (x.unsqueeze(-1) * self.weight).sum(-2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class AddedKeys(nn.Module):
    """Of nn.MultiheadAttention, what is not written out."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class StridedRows(AddMM):
    def forward(self, x):
        return F.linear(x, self.weight[::2]).repeat(1, 1, 2)


class Attention(nn.Module):
    """``weight``: how it reads the packed projections."""

    def __init__(self, weight=lambda weight: weight):
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.weight = weight

    def forward(self, x):
        m, y = self.inner, x.transpose(0, 1)
        return F.multi_head_attention_forward(
            y, y, y, WIDTH, 2, self.weight(m.in_proj_weight), m.in_proj_bias, None, None, False, 0.0,
            m.out_proj.weight, m.out_proj.bias, training=False, need_weights=False,
        )[0].transpose(0, 1)  # fmt: skip


class ComputedWeights(Attention):
    def __init__(self):
        super().__init__(lambda weight: weight * 2)


@fx.wrap
def kernel(x):
    """Attention that the tracer keeps whole."""
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Wrapped(nn.Module):
    def forward(self, x):
        return kernel(x)


class Cast(nn.Module):
    """Asks a layer for its dtype, as SAM-Med2D and transformers write it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


class CastAndMultiplied(Cast):
    def forward(self, x):
        return super().forward(x) @ self.proj.weight


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return self.conv(x.mT).mT


EXTRAS = {
    "addmm": (AddMM, "extra.addmm"),
    "einsum": (Einsum, "extra.einsum"),
    "matmul with a weight": (MatmulWeight, "extra.weight"),
    "a matrix element by element": (WeightByGate, "extra.weight"),
    "GRU": (Recurrent, "extra.gru"),
    "attention that adds keys": (AddedKeys, "extra.inner: .*add_bias_kv"),
    "a linear on every other row": (StridedRows, "calls linear on a bare weight"),
    "functional attention on a computed weight": (ComputedWeights, "multi_head_attention_forward"),
    "wrapped kernel": (Wrapped, "extra.kernel"),
    "Conv1d": (Convolution, "extra.conv"),
    "a weight asked for its dtype and multiplied": (CastAndMultiplied, "extra.proj.weight"),
}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, WIDTH, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("extra", EXTRAS)
def test_prepare_refuses_what_would_stay_in_floating_point(extra):
    make, name = EXTRAS[extra]
    net = Net(Block(make()), Block())
    kept = copy.deepcopy(net)
    with pytest.raises(ValueError, match=rf"unit 'blocks\.0'.*{name}.*leave"):
        prepare(net, Recipe.from_config("rtn"), ["blocks.*"])
    assert str(net) == str(kept)


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_the_caller_names_stays_and_is_shown(extra):
    make, _ = EXTRAS[extra]
    net = Net(Block(make()))
    _, report = quantize(net, batches(), "rtn", units=["blocks.*"], leave=["extra"], progress=False)
    assert report.audit.passed
    left = [part for part in report.coverage.parts if part.kind == IN_UNITS and part.name.startswith("left: ")]
    assert left and (sum(part.macs for part in left) > 0) == (extra != "a matrix element by element")


def test_a_weight_that_is_asked_for_its_dtype_alone_is_no_hole():
    net = Net(Block(Cast()))
    prepare(net, Recipe.from_config("rtn"), ["blocks.*"])
    assert "extra.proj" in find_weight_layers(net.blocks[0])


def test_functional_attention_is_quantized():
    torch.manual_seed(0)
    net, items = Net(Block(Attention())).eval(), batches()
    with torch.no_grad():
        expected = net(items[0])
        model, report = quantize(net, items, "rtn", w_bits=8, a_bits=8, units=["blocks.*"], progress=False)
        assert report.audit.passed and float((model(items[0]) - expected).norm() / expected.norm()) < 0.05
    assert {"extra.inner.in_proj", "extra.inner.out_proj"} <= set(find_weight_layers(model.blocks[0]))
    assert not [part.name for part in report.coverage.parts if part.kind == IN_UNITS and part.macs]


def test_a_name_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`leave` entry 'no_such'"):
        prepare(Net(Block()), Recipe.from_config("rtn"), leave=["no_such"])


def test_torchvisions_swin_is_quantized_inside_its_wrapped_attention():
    """``shifted_window_attention`` is declared whole with ``fx.wrap``; without data to see sizes it stays so."""
    torch.manual_seed(0)
    swin, items = SwinTransformer([4, 4], 24, [2], [1], [7, 7]).eval(), [torch.randn(1, 3, 56, 56)]
    with pytest.raises(ValueError, match=r"shifted_window_attention.*swin_transformer\.py:\d+"):
        prepare(copy.deepcopy(swin), Recipe.from_config("rtn"))
    with torch.no_grad():
        expected = swin(items[0])
        model, report = quantize(swin, items, "rtn", w_bits=8, a_bits=8, progress=False)
        assert report.audit.passed and float((model(items[0]) - expected).norm() / expected.norm()) < 0.05
    assert {"attn.qkv", "attn.proj"} <= set(find_weight_layers(model.get_submodule("features.1.0")))


def test_the_audit_counts_what_a_kept_node_hides():
    """A node that passes every static check, since its name is on the list of what may stay, and multiplies inside."""
    net = Net(Block())
    prepare(net, Recipe.from_config("rtn"))
    unit = net.blocks[0]
    node = next(n for n in unit.graph.nodes if n.op == "call_function" and n.target is F.gelu)
    weight = torch.randn(2 * WIDTH, 2 * WIDTH)

    def gelu(x):
        return F.gelu(x @ weight)

    calibrate(net, batches(), progress=False)
    freeze(net)
    assert audit(net, batches()[0]).passed
    node.target = gelu
    unit.recompile()
    problems = audit(net, batches()[0]).problems
    assert any(node.name in problem and "multiply-accumulates" in problem for problem in problems), problems


def test_a_block_used_twice_is_quantized_on_every_path():
    block = Block()
    net = Net(block, block)
    net.alias = block
    model, report = quantize(net, batches(), "rtn", progress=False)
    assert report.audit.passed
    assert model.blocks[0] is model.blocks[1] is model.alias and isinstance(model.alias, fx.GraphModule)
    coverage = cover(model)
    assert coverage.share(INTEGERS) > 0.85
    assert {p.name for p in coverage.parts if p.kind == OUTSIDE} == {"head.weight", "head.bias"}


def test_coverage_adds_up(tiny_sam, tiny_items):
    from ahcq_plugin.zoo.sam import box_forward

    total = sum(parameter.numel() for parameter in tiny_sam.parameters())
    _, report = quantize(tiny_sam, tiny_items, "rtn", forward=box_forward, progress=False)
    coverage = report.coverage
    assert sum(part.weights for part in coverage.parts) == total
    assert sum(coverage.share(kind) for kind in (INTEGERS, IN_UNITS, OUTSIDE)) == pytest.approx(1)
    assert sum(coverage.share(kind, "macs") for kind in (INTEGERS, IN_UNITS, OUTSIDE)) == pytest.approx(1)
    assert any(part.name == "relative positions" and part.macs > 0 for part in coverage.parts)
    assert report.to_dict()["coverage"]["shares"][INTEGERS]["weights"] == coverage.share(INTEGERS)


def test_parts_that_structure_does_not_find_are_told(caplog):
    """A block whose MLP hides behind ``**kwargs`` is a unit by its attention alone."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Block()
            self.experts = nn.ModuleDict({str(i): nn.Linear(WIDTH, 8 * WIDTH) for i in range(8)})

        def forward(self, x, **kwargs):
            return self.attention(x) + sum(layer(x)[..., :WIDTH] for layer in self.experts.values())

    with caplog.at_level("WARNING", "ahcq_plugin.ptq.prepare"):
        prepare(Net(Block()), Recipe.from_config("rtn"))
    assert not caplog.records
    with caplog.at_level("WARNING", "ahcq_plugin.ptq.prepare"):
        prepare(Net(Hidden()), Recipe.from_config("rtn"), units=["*.attention"])
    assert "% of the weights lie outside of the 1 units" in caplog.text and "blocks.0" in caplog.text


def test_a_unit_by_itself_is_audited_as_one_in_a_model():
    net = Net(Block())
    prepare(net, Recipe.from_config("rtn"))
    calibrate(net, batches(), progress=False)
    report = audit(freeze(net).blocks[0], batches()[0])
    assert report.passed, report.problems
    assert report.coverage.share(INTEGERS, "macs") == 1
