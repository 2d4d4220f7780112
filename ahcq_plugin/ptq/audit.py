# SPDX-License-Identifier: Apache-2.0
"""Proof that a frozen model is quantized all the way: what the numbers of a report stand on.

Published figures were inflated by inputs left unquantized (QDrop's drop mode) and by layers with soft rounding; the
audit finds either by comparing what flows with what the codes say, not by trusting flags alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, layer_input, matmul_operands
from ahcq_plugin.ptq.freeze import unfrozen
from ahcq_plugin.ptq.prepared import is_weight, quantizers, watched, weight_layers
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class AuditReport:
    """Outcome of ``audit``.

    Attributes:
        passed: nothing was found.
        problems: one line each, naming the quantizer or layer.
        counts: role -> number of values quantized on the audited batch (``weight``: number of weights).
        quantizers: role -> number of quantizers.
    """

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    quantizers: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"passed": self.passed, **asdict(self)}


class AuditError(RuntimeError):
    """A model failed its audit: no figure of it may be reported."""

    def __init__(self, report: AuditReport):
        shown = "\n  ".join(report.problems[:20])
        super().__init__(f"the audit failed with {len(report.problems)} problems; no result is reported:\n  {shown}")
        self.report = report


@torch.no_grad()
def audit(model: nn.Module, batch: Any, forward: Forward | None = None) -> AuditReport:
    """Check a frozen model on one item of data.

    Every quantizer is on, observes nothing, drops nothing and rounds hard; every weight is on its grid; on ``batch``
    every quantizer is reached, and what leaves it equals ``decode(encode(input))`` and is on the grid, bit for bit;
    every Linear and Conv2d in a unit has a quantized weight and reads a quantizer, and between the quantizers and a
    matmul stand only changes of shape and scalar factors (``graph/ops.py`` has the lists), with dropout off.
    """
    report = AuditReport()
    units = prepared_units(model)
    if not units:
        report.problems.append("the model has no quantized unit: run `prepare` first")
    for name, unit in units.items():
        report.problems.extend(f"{name}.{problem}" for problem in _uncovered(unit))
    for name, quantizer in quantizers(model):
        report.problems.extend(f"{name}: {problem}" for problem in unfrozen(quantizer))
    for name, layer in weight_layers(model).items():
        on_grid = layer.weight_fake_quant.decode(layer.weight_fake_quant.encode(layer.weight)).to(layer.weight.dtype)
        if not torch.equal(on_grid, layer.weight):
            off = int((on_grid != layer.weight).sum())
            report.problems.append(f"{name}: {off} of {layer.weight.numel()} weights are off their grid")
    _check_values(model, batch, forward or default_forward, report)
    return report


def _uncovered(unit: fx.GraphModule) -> list[str]:
    """Layers and matmuls of a unit that compute on unquantized values."""
    index, problems = GraphIndex(unit, unit.graph), []
    for node in unit.graph.nodes:
        if index.is_layer(node):
            if not isinstance(getattr(index.module(node), "weight_fake_quant", None), FakeQuantize):
                problems.append(f"{node.target}: its weight has no quantizer")
            if not _is_quantizer(index, layer_input(node)[1]):
                problems.append(f"{node.target}: its input is not quantized")
        elif index.is_matmul(node):
            for side, (_, operand) in zip(("left", "right"), matmul_operands(node), strict=True):
                if not _comes_from_quantizer(index, operand):
                    problems.append(f"{node.name}: its {side} operand is not quantized")
    return problems


def _is_quantizer(index: GraphIndex, node: fx.Node) -> bool:
    return isinstance(index.module(node), FakeQuantize)


def _comes_from_quantizer(index: GraphIndex, node: fx.Node) -> bool:
    """Whether only changes of shape and scalar factors stand between a quantizer and the tensor ``node``."""
    *between, source = index.walk_back(node)
    return _is_quantizer(index, source) and not any(_changes_values(index, step) for step in between)


def _changes_values(index: GraphIndex, node: fx.Node) -> bool:
    """Whether a node that passes for a change of shape does more: dropout that is on, padding with something but 0.

    Zeros from padding add nothing to a product.
    """
    if node.target in (F.dropout, torch.dropout):
        return _given(node, 2, "train" if node.target is torch.dropout else "training", True) is not False
    if node.target is F.pad:
        return _given(node, 3, "value", None) not in (None, 0)
    return isinstance(index.module(node), DROPOUTS) and index.module(node).training


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _check_values(model: nn.Module, batch: Any, forward: Forward, report: AuditReport) -> None:
    counts: dict[str, int] = defaultdict(int)
    problems: dict[str, str] = {}
    calls: set[str] = set()

    def compare(name: str, quantizer: FakeQuantize, x: Tensor, out: Tensor) -> None:
        if not is_weight(quantizer) or name not in calls:
            counts[quantizer.role] += out.numel()
        calls.add(name)
        expected = quantizer.decode(quantizer.encode(x)).to(out.dtype)
        if not torch.equal(out, expected):
            share = float((out != expected).float().mean())
            problems.setdefault(name, f"{share:.2%} of its output differs from decode(encode(input))")
        elif not torch.equal(quantizer.decode(quantizer.encode(out)).to(out.dtype), out):
            problems.setdefault(name, "its output is not on the grid")

    with watched(dict(quantizers(model)), compare):
        forward(model, to_device(batch, model_device(model)))
    per_role: dict[str, int] = defaultdict(int)
    for name, quantizer in quantizers(model):
        per_role[quantizer.role] += 1
        if name not in calls:
            problems[name] = "no data reaches it"
    report.problems.extend(f"{name}: {problem}" for name, problem in problems.items())
    report.counts.update(counts)
    report.quantizers.update(per_role)
