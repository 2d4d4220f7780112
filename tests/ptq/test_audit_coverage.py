# SPDX-License-Identifier: Apache-2.0
"""What the audit lets stand between a quantizer and the layer or matmul that is to compute on its codes."""

import copy
import operator
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare, quantizers

SPELLINGS = {
    "matmul": torch.matmul,
    "operator": lambda a, b: a @ b,
    "keywords": lambda a, b: torch.matmul(input=a, other=b),
    "bmm": torch.bmm,
    "bmm by keyword": lambda a, b: torch.bmm(a, mat2=b),
    "linalg": torch.linalg.matmul,
    "method": lambda a, b: a.matmul(b),
    "baddbmm": lambda a, b: torch.baddbmm(torch.zeros_like(a[:, :, :1]), a, b, beta=0, alpha=0.5),
    "baddbmm by keyword": lambda a, b: torch.baddbmm(input=torch.zeros_like(a[:, :, :1]), batch1=a, batch2=b),
}


class Block(nn.Module):
    """Attention and MLP; ``product`` multiplies, ``call`` calls the layers."""

    def __init__(self, product, call):
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (nn.Linear(8, 8) for _ in range(6))
        self.dropout, self.product, self.call = nn.Dropout(0.5), product, call

    def forward(self, x):
        q, k, v = (self.call(layer, x) for layer in (self.q, self.k, self.v))
        scores = self.product(q * 0.5, k.transpose(1, 2))
        x = x + self.call(self.out, self.product(self.dropout(scores.softmax(-1)), v))
        return x + self.call(self.down, F.gelu(self.call(self.up, x)))


def item(seed=0):
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def positional(layer, x):
    return layer(x)


def by_keyword(layer, x):
    return layer(input=x)


@cache
def frozen(spelling, call):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Block(SPELLINGS[spelling], call)).eval()
    prepare(model, Recipe.from_config("rtn", w_bits=4, a_bits=4), units="0")
    calibrate(model, [item(0), item(1)], progress=False)
    return freeze(model)


def frozen_block(spelling="matmul", call=positional):
    return copy.deepcopy(frozen(spelling, call))


def change(model, role, new_source):
    """Have what reads the quantizer of ``role`` read ``new_source(graph, its node)``; None takes the quantizer away."""
    (unit,) = prepared_units(model).values()
    for node in list(unit.graph.nodes):
        if node.op == "call_module" and getattr(unit.get_submodule(node.target), "role", "") == role:
            users = list(node.users)
            with unit.graph.inserting_before(users[0]):
                source = new_source(unit.graph, node) if new_source else node.args[0]
            for user in users:
                user.replace_input_with(node, source)
    unit.recompile()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_matmul_is_quantized_and_checked(spelling):
    model = frozen_block(spelling)
    assert sorted(q.role for _, q in quantizers(model) if q.role in ("q", "k", "v", "softmax")) == [
        "k", "q", "softmax", "v"
    ]  # fmt: skip
    assert audit(model, item(2)).problems == []
    for role, side in (("q", "left"), ("k", "right"), ("softmax", "left"), ("v", "right")):
        model = frozen_block(spelling)
        change(model, role, None)
        problems = audit(model, item(2)).problems
        assert [p for p in problems if f"its {side} operand is not quantized" in p], (role, problems)


def test_a_layer_called_by_keyword_is_checked():
    model = frozen_block(call=by_keyword)
    assert audit(model, item(2)).problems == []
    change(model, "post_act", None)
    assert "0.down: its input is not quantized" in audit(model, item(2)).problems


def applied(function, *args, **kwargs):
    return lambda graph, node: graph.call_function(function, (node, *args), kwargs)


def times_a_tensor(graph, node):
    return graph.call_function(operator.mul, (node, graph.call_function(torch.cos, (node,))))


def times_a_tensor_by_keyword(graph, node):
    return graph.call_function(torch.mul, (node,), {"other": graph.call_function(torch.cos, (node,))})


@pytest.mark.parametrize(
    "step",
    [
        applied(operator.add, 0.3),
        applied(torch.sub, 0.3),
        applied(F.gelu),
        applied(torch.exp),
        applied(torch.clamp, 0.0),
        applied(F.softmax, dim=-1),
        applied(F.normalize),
        applied(F.dropout, 0.5),
        applied(F.dropout, p=0.5, training=True),
        applied(F.pad, (0, 0, 0, 0), "constant", 0.5),
        applied(torch.div, 0.7, rounding_mode="floor"),
        times_a_tensor,
        times_a_tensor_by_keyword,
        lambda graph, node: graph.call_method("add", (node, 0.3)),
        lambda graph, node: graph.call_method("sigmoid", (node,)),
    ],
)
@pytest.mark.parametrize(("role", "side"), [("q", "left"), ("v", "right")])
def test_what_changes_values_behind_a_quantizer_is_found(step, role, side):
    model = frozen_block()
    change(model, role, step)
    assert any(f"its {side} operand is not quantized" in p for p in audit(model, item(2)).problems)


@pytest.mark.parametrize(
    "step",
    [
        applied(operator.mul, 0.5),
        applied(torch.mul, other=0.5),
        applied(operator.truediv, 3),
        applied(operator.neg),
        applied(F.dropout, 0.5, False),
        applied(F.dropout, training=False),
        applied(F.pad, (0, 0, 0, 0)),
        lambda graph, node: graph.call_method("contiguous", (node,)),
        lambda graph, node: graph.call_method("roll", (node, 1, 1)),
    ],
)
def test_changes_of_shape_and_scalar_factors_may_stand_there(step):
    model = frozen_block()
    change(model, "v", step)
    assert audit(model, item(2)).problems == []


def test_dropout_that_is_on_is_found():
    model = frozen_block()
    (unit,) = prepared_units(model).values()
    unit.dropout.train()
    assert any("its left operand is not quantized" in p for p in audit(model, item(2)).problems)
