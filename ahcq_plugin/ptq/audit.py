# SPDX-License-Identifier: Apache-2.0
"""Proof that a frozen model is quantized all the way: what the numbers of a report stand on.

Published figures were inflated by inputs left unquantized (QDrop's drop mode) and by layers with soft rounding; the
audit finds either by comparing what flows with what the codes say, not by trusting flags alone.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import is_weight, quantizers, watched, weight_layers
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device

MATMULS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}


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
    every Linear and Conv in a unit has a quantized weight and input, every matmul two quantized operands.
    """
    report = AuditReport()
    units = prepared_units(model)
    if not units:
        report.problems.append("the model has no quantized unit: run `prepare` first")
    for name, unit in units.items():
        report.problems.extend(f"{name}.{problem}" for problem in _uncovered(unit))
    for name, quantizer in quantizers(model):
        report.problems.extend(f"{name}: {problem}" for problem in _wrong_modes(quantizer))
    for name, layer in weight_layers(model).items():
        on_grid = layer.weight_fake_quant.decode(layer.weight_fake_quant.encode(layer.weight)).to(layer.weight.dtype)
        if not torch.equal(on_grid, layer.weight):
            off = int((on_grid != layer.weight).sum())
            report.problems.append(f"{name}: {off} of {layer.weight.numel()} weights are off their grid")
    _check_values(model, batch, forward or default_forward, report)
    return report


def _wrong_modes(quantizer: FakeQuantize) -> list[str]:
    found = []
    if quantizer.observing:
        found.append("its observer is on")
    if not quantizer.quantizing:
        found.append("quantization is off")
    if quantizer.prob != 1.0:
        found.append(f"drop mode is on: only {quantizer.prob:.0%} of the elements are quantized")
    if is_weight(quantizer) and quantizer.adaround:
        found.append("soft rounding is on")
    return found + quantizer.problems()


def _uncovered(unit: fx.GraphModule) -> list[str]:
    """Layers and matmuls of a unit that compute on unquantized values."""
    found = []
    for node in unit.graph.nodes:
        if node.op == "call_module":
            layer = unit.get_submodule(node.target)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                if not isinstance(getattr(layer, "weight_fake_quant", None), FakeQuantize):
                    found.append(f"{node.target}: its weight has no quantizer")
                if not _is_quantizer(unit, node.args[0]):
                    found.append(f"{node.target}: its input is not quantized")
        elif node.op in ("call_function", "call_method") and node.target in MATMULS:
            for side, operand in zip(("left", "right"), node.args[:2], strict=True):
                if not _comes_from_quantizer(unit, operand):
                    found.append(f"{node.name}: its {side} operand is not quantized")
    return found


def _is_quantizer(unit: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(unit.get_submodule(node.target), FakeQuantize)


def _comes_from_quantizer(unit: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a quantizer comes before any layer on the way back along first operands (reshapes, scalar factors)."""
    while not _is_quantizer(unit, node):
        if node.op in ("placeholder", "get_attr") or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module" and not isinstance(unit.get_submodule(node.target), (nn.Identity, nn.Dropout)):
            return False
        if "softmax" in str(getattr(node.target, "__name__", node.target)):
            return False
        node = node.args[0]
    return True


def _check_values(model: nn.Module, batch: Any, forward: Forward, report: AuditReport) -> None:
    counts: dict[str, int] = defaultdict(int)
    found: dict[str, str] = {}
    calls: set[str] = set()

    def compare(name: str, quantizer: FakeQuantize, x: Tensor, out: Tensor) -> None:
        if not is_weight(quantizer) or name not in calls:
            counts[quantizer.role] += out.numel()
        calls.add(name)
        expected = quantizer.decode(quantizer.encode(x)).to(out.dtype)
        if not torch.equal(out, expected):
            share = float((out != expected).float().mean())
            found.setdefault(name, f"{share:.2%} of its output differs from decode(encode(input))")
        elif not torch.equal(quantizer.decode(quantizer.encode(out)).to(out.dtype), out):
            found.setdefault(name, "its output is not on the grid")

    with watched(dict(quantizers(model)), compare):
        forward(model, to_device(batch, model_device(model)))
    per_role: dict[str, int] = defaultdict(int)
    for name, quantizer in quantizers(model):
        per_role[quantizer.role] += 1
        if name not in calls:
            found[name] = "no data reaches it"
    report.problems.extend(f"{name}: {problem}" for name, problem in found.items())
    report.counts.update(counts)
    report.quantizers.update(per_role)
