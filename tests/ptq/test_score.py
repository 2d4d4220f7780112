# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahcq_plugin.graph import trace_unit
from ahcq_plugin.ptq import Recipe, prepare, quantizers
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
