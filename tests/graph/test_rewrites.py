# SPDX-License-Identifier: Apache-2.0
"""The explicit form of fused attention equals the fused operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import trace_unit


class Fused(nn.Module):
    """Calls the fused operator with fixed extra arguments, and a mask that is a buffer."""

    def __init__(self, mask: Tensor | None = None, **extra) -> None:
        super().__init__()
        self.extra = extra
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask, **self.extra)


def qkv(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return [torch.randn(2, 3, n, 8, generator=generator) for n in (queries, keys, keys)]


BOOL_MASK = torch.tensor([[True, False, True, True]] * 5)
CASES = {
    "plain": Fused(),
    "scale": Fused(scale=0.3),
    "causal": Fused(is_causal=True),
    "bool-mask": Fused(BOOL_MASK),
    "float-mask": Fused(torch.linspace(-2, 2, 20).reshape(5, 4), scale=0.7),
}


@pytest.mark.parametrize("case", CASES)
def test_explicit_attention_equals_the_fused_one(case):
    traced = trace_unit(CASES[case], case)
    arguments = qkv(5, 4)
    torch.testing.assert_close(traced(*arguments), CASES[case](*arguments), rtol=1e-5, atol=1e-6)
    targets = {node.target for node in traced.graph.nodes}
    assert torch.softmax in targets and F.scaled_dot_product_attention not in targets


def test_attention_sizes_stay_dynamic():
    traced = trace_unit(Fused(is_causal=True), "unit")
    for queries, keys in ((3, 3), (2, 6), (6, 2)):
        arguments = qkv(queries, keys)
        expected = F.scaled_dot_product_attention(*arguments, is_causal=True)
        torch.testing.assert_close(traced(*arguments), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [{"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_the_explicit_form_cannot_do_is_refused(extra):
    name = next(iter(extra))
    with pytest.raises(RuntimeError, match=rf"unit 'x' \(Fused\) .*`{name}={extra[name]}` is not supported"):
        trace_unit(Fused(**extra), "x")
