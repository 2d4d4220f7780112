# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahcq_plugin.graph import trace_unit
from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers
from ahcq_plugin.ptq.score import ProductRunner
from ahcq_plugin.zoo.sam import box_forward


class Noting:
    """Puts a note of every ``score`` call in place of the quantizer's own method."""

    def __init__(self, quantizer):
        self.calls = []
        quantizer.score = lambda x, product: self.calls.append((x, product))


def test_products_are_what_the_tensor_leads_to(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    unit = tiny_sam.mask_decoder.transformer.layers[1]
    chosen = {q.role: q for _, q in quantizers(unit) if q.role in ("post_act", "softmax")}
    notes = {role: Noting(quantizer) for role, quantizer in chosen.items()}
    captured, outputs = [], []
    unit.register_forward_hook(lambda _, args, kwargs, out: captured.append((args, kwargs, out)), with_kwargs=True)
    unit.mlp.lin2.register_forward_hook(lambda _, args, out: outputs.append(out - unit.mlp.lin2.bias))
    with torch.no_grad():
        box_forward(tiny_sam, tiny_items[2])
        args, kwargs, expected = captured.pop()
        runner = ProductRunner(unit, set(chosen.values()))
        for a, b in zip(runner(*args, **kwargs), expected, strict=True):
            assert torch.equal(a, b)
        (x, product) = notes["post_act"].calls[0]
        torch.testing.assert_close(product(x), outputs[-1])
        torch.testing.assert_close(product(x[..., 1:3, :]), outputs[-1][..., 1:3, :])
        (weights, product) = notes["softmax"].calls[0]
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert product(weights).shape == (*weights.shape[:-1], 4)  # head width: 16 channels, halved, 2 heads
        torch.testing.assert_close(product(weights[..., 2:, :]), product(weights)[..., 2:, :])


class Transposed(nn.Module):
    """Attention with the weights as the right factor of the second product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        weights = F.softmax(self.q(x) @ self.k(x).transpose(-1, -2), dim=-1)
        return (self.v(x).transpose(-1, -2) @ weights.transpose(-1, -2)).transpose(-1, -2)


def test_weights_on_the_right_are_turned():
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Transposed()}).eval()
    prepare(model, Recipe.from_config("rtn"), units=["block"])
    (quantizer,) = [q for _, q in quantizers(model) if q.role == "softmax"]
    note, x = Noting(quantizer), torch.randn(2, 5, 8)
    with torch.no_grad():
        out = ProductRunner(model["block"], {quantizer})(x)
    ((weights, product),) = note.calls
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(product(weights), out)
    torch.testing.assert_close(product(weights[:, 1:2]), out[:, 1:2])


class Scaled(nn.Module):
    """Attention with scalar factors and changes of shape, in either order, between q, k, v and the products."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x):
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(self.q(x) * 0.25), self.heads(self.k(x)) / 3, self.heads(self.v(x))
        weights = (q @ k.mT).softmax(-1)
        return self.out((weights @ (v * 2)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("together", [False, True], ids=["alone", "with all others"])
@pytest.mark.parametrize("role", ["q", "k", "v", "softmax"])
def test_every_operand_is_scored_by_its_product(role, together):
    """Against the formula: x is the quantizer's own tensor, without the factors behind it, and its product is that of
    the matmul, whoever else is scored."""
    torch.manual_seed(0)
    block = Scaled()
    model = nn.ModuleDict({"block": block}).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        q, k, v = (block.heads(layer(x)) for layer in (block.q, block.k, block.v))
        weights = (q * 0.25 @ (k / 3).mT).softmax(-1)
        expected = {
            "q": (q, q @ (k / 3).mT),
            "k": (k, k @ (q * 0.25).mT),
            "v": (v.mT, v.mT @ weights.mT),
            "softmax": (weights, weights @ (v * 2)),
        }
    prepare(model, Recipe.from_config("rtn"), units=["block"])
    chosen = {quantizer.role: quantizer for _, quantizer in quantizers(model) if quantizer.role in expected}
    notes = {name: Noting(quantizer) for name, quantizer in chosen.items()}
    with torch.no_grad():
        runner = ProductRunner(model["block"], set(chosen.values()) if together else {chosen[role]})
        assert torch.equal(runner(x), model["block"](x))
        ((tensor, product),) = notes[role].calls
        torch.testing.assert_close(tensor, expected[role][0])
        torch.testing.assert_close(product(tensor), expected[role][1])
        torch.testing.assert_close(product(tensor[..., 1:3, :]), expected[role][1][..., 1:3, :])


def test_searched_ranges_leave_softmax_its_product():
    """LNQ beside searched ranges of v: the shape factor is the one that A V asks for, as without the search."""
    torch.manual_seed(0)
    x = [torch.randn(3, 10, 8) * 2 for _ in range(2)]
    found = []
    for searching in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleDict({"block": Scaled()}).eval()
        prepare(model, Recipe.from_config("rtn", lnq=True, range_by_output_error=searching), units=["block"])
        calibrate(model, x, forward=lambda model, item: model["block"](item), progress=False)
        (softmax,) = [quantizer for _, quantizer in quantizers(model) if quantizer.role == "softmax"]
        found.append(softmax.state_dict())
    assert found[0].keys() == found[1].keys() and all(torch.equal(a, found[1][name]) for name, a in found[0].items())


def test_keyword_arguments_and_defaults():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y, scale=2.0):
            return self.b(F.gelu(self.a(x))) * scale + y

    block = Block().eval()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    runner = ProductRunner(trace_unit(block, "block"), set())
    assert torch.equal(runner(y=y, x=x), block(x, y))
    assert torch.equal(runner(x, y=y), block(x, y))
    with pytest.raises(ValueError, match="argument `scale` was fixed to its default 2.0"):
        runner(x, y, scale=3.0)
