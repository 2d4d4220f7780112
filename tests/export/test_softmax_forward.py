# SPDX-License-Identifier: Apache-2.0
"""The golden model with softmax on tables: which scores and terms reach it in models, and what stays in float."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ahcq_plugin import quantize
from ahcq_plugin.export import SpecError, TableOperand, make_spec
from ahcq_plugin.export.compare import golden_forward, mask_overlap, table_softmax_forward
from ahcq_plugin.export.operands import UniformOperand
from ahcq_plugin.export.table_softmax import MASKED, TableSoftmax, score_bits
from ahcq_plugin.zoo.sam import box_forward

TOKENS = 12


class Attention(nn.Module):
    """One head, whose scores go through ``change`` and ``normalise``."""

    def __init__(self, change: Callable[[Attention, Tensor], Tensor], normalise: nn.Module | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.normal_(self.qkv.weight, generator=generator)
        self.change, self.normalise = change, normalise or nn.Softmax(dim=-1)
        self.register_buffer("bias", torch.randn(TOKENS, TOKENS, generator=generator))
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 8)).unbind(-2)
        return self.proj(self.normalise(self.change(self, q @ k.transpose(-2, -1))) @ v)


CHANGES = {
    "none": lambda self, scores: scores,
    "scaled": lambda self, scores: scores / math.sqrt(8),
    "bias": lambda self, scores: scores * 0.3 + self.bias,
    "bias first": lambda self, scores: self.bias + scores * 0.3,
    "scaled behind the bias": lambda self, scores: (scores + self.bias).mul(0.25),
    "two terms": lambda self, scores: (scores * 0.2 + self.bias).add(self.mask),
    "mask": lambda self, scores: (scores * 0.2).unsqueeze(1).add(self.mask).squeeze(1),
    "large negative mask": lambda self, scores: scores * 0.2 + self.mask.clamp(min=-1e30),
}
BATCH = torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))


def run(module: nn.Module):
    model, recipe = nn.Sequential(module).eval(), {"name": "rtn", "lnq": True}
    qmodel, _ = quantize(model, [BATCH], recipe, units=["0"], progress=False)
    spec = make_spec(qmodel, BATCH)
    out, rows = table_softmax_forward(qmodel, spec, BATCH)
    (row,) = rows.values()
    return qmodel, spec, out, row


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_scores_and_terms_reach_the_tables(change) -> None:
    qmodel, spec, out, row = run(Attention(change))
    assert row.reason == "" and row.codes == BATCH.shape[0] * TOKENS**2
    assert row.further == 0 and row.differing <= 2
    if row.differing == 0:
        assert torch.equal(out, golden_forward(qmodel, spec, BATCH))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(CHANGES["none"], nn.Softmax(dim=1)), "over axis 1, not the last"),
        (Attention(lambda self, scores: scores * -0.3), "not positive"),
        (Attention(lambda self, scores: scores.clamp(max=3.0)), "node 'clamp', which tables do not know"),
        (Attention(lambda self, scores: scores.masked_fill(self.mask < 0, -9.0)), "node 'masked_fill'"),
    ],
)
def test_what_tables_do_not_know_stays_in_floating_point_and_says_why(module, reason: str) -> None:
    qmodel, spec, out, row = run(module)
    assert reason in row.reason and row.codes == 0
    assert torch.equal(out, golden_forward(qmodel, spec, BATCH))


def test_nan_among_the_terms_is_named() -> None:
    module = Attention(CHANGES["bias"])
    qmodel, _ = quantize(nn.Sequential(module).eval(), [BATCH], "rtn", 4, 4, units=["0"], progress=False)
    spec = make_spec(qmodel, BATCH)
    qmodel.get_submodule("0").bias.fill_(math.nan)
    with pytest.raises(SpecError, match="adds NaN to scores"):
        table_softmax_forward(qmodel, spec, BATCH)


def test_integers_are_the_accumulators_and_the_rounded_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a biased attention, from the float model by another route."""
    seen, plain = [], TableSoftmax.run

    def watched(self: TableSoftmax, scores: np.ndarray, heads: np.ndarray | None) -> np.ndarray:
        seen.append(scores)
        return plain(self, scores, heads)

    monkeypatch.setattr(TableSoftmax, "run", watched)
    qmodel, spec, _, _ = run(Attention(CHANGES["two terms"]))
    unit = qmodel.get_submodule("0")
    (qk,) = (m for _, m in spec.matmuls() if m.kind == "qk")
    codes = {}
    for module in unit.modules():
        if getattr(module, "role", "") in ("q", "k"):
            module.register_forward_hook(lambda m, args, out, role=module.role: codes.update({role: m.encode(args[0])}))
    qmodel(BATCH)
    q, k = (codes["q"] - qk.left.zero_point).double(), (codes["k"] - qk.right.zero_point).double()
    scale = np.float64(qk.left.scale * qk.right.scale) * 0.2
    bits = score_bits(np.array([scale]))
    wanted = (q @ k.mT).long() * 2**bits + torch.round(unit.bias.double() * 2**bits / scale).long()
    wanted = torch.where(unit.mask < 0, MASKED, wanted)
    assert 0 < bits <= 12 and np.array_equal(seen[0], wanted.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"name": "rtn", "agq": True}, TableOperand),
        ({"name": "rtn"}, UniformOperand),
        ({"name": "rtn", "lnq": True, "a_bits": 8, "per_head": True}, TableOperand),
        ({"name": "rtn", "lnq": True, "quantize_positions": True}, TableOperand),
    ],
    ids=["agq", "uniform", "lnq, 8 bits, heads", "quantized positions"],
)
def test_every_softmax_of_a_sam(recipe, kind, tiny_sam, tiny_items) -> None:
    qmodel, _ = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, progress=False)
    spec = make_spec(qmodel, tiny_items[0], box_forward)
    assert {type(m.left) for _, m in spec.matmuls() if m.kind == "av"} == {kind}
    _, rows = table_softmax_forward(qmodel, spec, tiny_items[0], box_forward)
    assert rows and all(row.reason == "" and row.codes for row in rows.values())
    assert sum(row.further for row in rows.values()) == 0
    assert sum(row.differing for row in rows.values()) <= 0.005 * sum(row.codes for row in rows.values())


@pytest.mark.slow
def test_masks_of_the_packaged_sam(quantized, spec, scenes) -> None:
    """Few codes differ, none by more than a level; masks follow as they do where the last bit of an image changes."""
    floats = [golden_forward(quantized, spec, batch, box_forward)[0] for batch in scenes]
    tables = []
    for batch in scenes:
        out, rows = table_softmax_forward(quantized, spec, batch, box_forward)
        tables.append(out[0])
        assert all(row.reason == "" for row in rows.values())
        assert sum(row.further for row in rows.values()) == 0
        assert sum(row.differing for row in rows.values()) <= 1e-4 * sum(row.codes for row in rows.values())
    chosen = golden_forward(quantized, spec, scenes[0], box_forward, softmax="tables")[0]
    assert torch.equal(chosen, tables[0]) and not torch.equal(chosen, floats[0])
    overlaps = torch.cat([mask_overlap(a, b)[0] for a, b in zip(floats, tables, strict=True)])
    assert overlaps.mean() > 0.8


def test_the_switch() -> None:
    qmodel, spec, out, _ = run(Attention(CHANGES["bias"]))
    assert torch.equal(golden_forward(qmodel, spec, BATCH, softmax="tables"), out)
    assert torch.equal(golden_forward(qmodel, spec, BATCH), golden_forward(qmodel, spec, BATCH, softmax="float"))
    with pytest.raises(ValueError, match="must be one of float, tables, got 'table'"):
        golden_forward(qmodel, spec, BATCH, softmax="table")
