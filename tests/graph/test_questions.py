# SPDX-License-Identifier: Apache-2.0
"""What a block's code asks without needing the answer limits no input; every answer that it needs is still checked."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import trace_unit
from ahcq_plugin.graph.calls import Call
from ahcq_plugin.graph.questions import drop_idle_questions
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare

WIDTH = 8


class Block(nn.Module):
    """Two Linears; ``kind`` of the subclass says which computes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        return self.one(x) if self.takes_one(x, causal) else self.other(x)


class Idle(Block):
    """As the attention of transformers asks: the last decides."""

    def takes_one(self, x, causal):
        return not (x.shape[1] > 1 and x.shape[0] < 9 and causal)


class Needed(Block):
    def takes_one(self, x, causal):
        return x.shape[1] > 1


class Together(Block):
    """Either answer alone changes nothing, both do."""

    def takes_one(self, x, causal):
        return bool(x.shape[1] > 1) + bool(x.shape[0] < 9) > 0


class Behind(Block):
    """The second question is asked only where the first is answered with no."""

    def takes_one(self, x, causal):
        return x.shape[1] > 1 or x.shape[0] < 9


class Raises(Block):
    def takes_one(self, x, causal):
        if x.shape[1] == 1:
            raise NotImplementedError("one token")
        return True


def traced(kind: type[Block]):
    torch.manual_seed(0)
    block = kind().eval()
    call = Call.of((torch.zeros(2, 4, WIDTH),), {})
    unit = trace_unit(block, "block", call=call)
    keys = set(vars(block))
    dropped = drop_idle_questions(unit, block, call)
    assert set(vars(block)) == keys
    return block, unit, dropped


SIZES = [torch.randn(batch, length, WIDTH) for batch, length in itertools.product((2, 12), (4, 1))]


@pytest.mark.parametrize("kind", [Idle, Needed, Together, Behind, Raises])
def test_a_unit_computes_what_its_block_does_or_refuses_whatever_the_sizes(kind):
    block, unit, _ = traced(kind)
    for x in SIZES:
        try:
            got = unit(x)
        except ValueError as error:
            assert "this unit was captured where" in str(error) and kind is not Idle
        else:
            assert torch.equal(got, block(x)), kind


@pytest.mark.parametrize("kind, count", [(Idle, 2), (Needed, 0), (Together, 1), (Behind, 0), (Raises, 0)])
def test_questions_are_dropped_that_no_combination_of_answers_needs(kind, count):
    _, unit, dropped = traced(kind)
    assert len(dropped) == count
    unit.graph.lint()
    if kind is Idle:
        assert [node.op for node in unit.graph.nodes if node.op == "call_function"] == ["call_function"]  # of `causal`


class Attention(nn.Module):
    """Called with several queries and with one, as the perceiver of EdgeTAM is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        q, (k, v) = self.q(x)[:, None], self.kv(memory)[:, None].chunk(2, -1)
        is_causal = q.shape[2] > 1 and causal
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[:, 0])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers[0](x, x), self.layers[0](x[:, :1], x)], 1)


def test_a_unit_that_is_called_with_one_query_and_with_several_is_quantized():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        expected = model(x)
        prepare(model, Recipe.from_config("rtn", w_bits=8, a_bits=8), run=lambda model: model(x))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        calibrate(model, [(x,)], progress=False)
        assert audit(freeze(model), (x,)).passed
        assert 0 < (model(x) - expected).norm() < 0.1 * expected.norm()
