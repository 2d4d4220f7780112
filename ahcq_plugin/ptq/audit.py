# SPDX-License-Identifier: Apache-2.0
"""Proof that a frozen model is quantized all the way: what the numbers of a report stand on.

Published figures were inflated by inputs left unquantized (QDrop's drop mode) and by layers with soft rounding; the
audit finds either by comparing what flows with what the codes say, not by trusting flags alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.allowed import node_name
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.ptq.coverage import Coverage, cover, may_multiply
from ahcq_plugin.ptq.freeze import unfrozen
from ahcq_plugin.ptq.macs import MacCounter, Place, count_macs, counted
from ahcq_plugin.ptq.prepared import intercepted, is_weight, quantizers, watched, weight_layers
from ahcq_plugin.ptq.recipe import Recipe, check_recipe
from ahcq_plugin.ptq.static import unquantized
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.batches import Forward, default_forward, model_device, naming_item, to_device
from ahcq_plugin.support.given import check_function, check_model


@dataclass(frozen=True)
class AuditReport:
    """Outcome of ``audit``.

    Attributes:
        passed: nothing was found.
        problems: one line each, naming the quantizer or layer.
        counts: role -> number of values quantized on the audited batch (``weight``: number of weights).
        quantizers: role -> number of quantizers.
        coverage: what computes on integers and by name what does not, with multiply-accumulates of the audited batch.
    """

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    quantizers: dict[str, int] = field(default_factory=dict)
    coverage: Coverage | None = None

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the coverage has a place of its own in a report."""
        content = {name: value for name, value in asdict(self).items() if name != "coverage"}
        return {"passed": self.passed, **content}


class AuditError(RuntimeError):
    """A model failed its audit: no figure of it may be reported."""

    exit_status = 1  # of a tool: the input was good, the result is not

    def __init__(self, report: AuditReport):
        shown = "\n  ".join(report.problems[:20])
        super().__init__(f"the audit failed with {len(report.problems)} problems; no result is reported:\n  {shown}")
        self.report = report


@torch.no_grad()
def audit(model: nn.Module, batch: Any, forward: Forward | None = None, recipe: Recipe | None = None) -> AuditReport:
    """Check a frozen model on one item of data.

    Every quantizer is on, observes nothing, drops nothing and rounds hard; every weight is on its grid; on ``batch``
    all values are finite, every quantizer is reached, and what leaves it equals ``decode(encode(input))`` and is on the
    grid, bit for bit; every Linear and Conv2d in a unit has a quantized weight and reads a quantizer, and between the
    quantizers and a matmul stand only changes of shape and scalar factors (``graph/ops.py`` has the lists), with
    dropout off. What else a unit computes is on a list of what may stay in floating point (``graph/allowed.py``), and
    no multiply-accumulate that really runs in a unit, whatever wraps it, belongs to anything but a quantized layer, a
    quantized matmul, a named exception or what the caller of ``prepare`` left.

    Args:
        recipe: every quantizer must have its bits; None: whatever bits they have.
    """
    check_model(model)
    if recipe is not None:
        check_recipe(recipe)
    forward = forward or default_forward
    check_function(forward, "forward")
    report = AuditReport()
    units = prepared_units(model)
    if not units:
        report.problems.append("the model has no quantized unit: run `prepare` first")
    for name, unit in units.items():
        report.problems.extend(f"{name}.{problem}" for problem in unquantized(unit))
    for name, quantizer in quantizers(model):
        report.problems.extend(f"{name}: {problem}" for problem in unfrozen(quantizer))
        wanted = quantizer.bits if recipe is None else recipe.w_bits if is_weight(quantizer) else recipe.a_bits
        if quantizer.bits != wanted:
            report.problems.append(f"{name}: it has {quantizer.bits} bits, the recipe says {wanted}")
    own = set(map(id, model.parameters()))
    for name, layer in weight_layers(model).items():
        on_grid = layer.weight_fake_quant.decode(layer.weight_fake_quant.encode(layer.weight)).to(layer.weight.dtype)
        if not own.issuperset(map(id, read_parameters(layer))):
            report.problems.append(f"{name}: it reads a parameter that the model has replaced; prepare the model anew")
        if not torch.equal(on_grid, layer.weight):
            off = int((on_grid != layer.weight).sum())
            report.problems.append(f"{name}: {off} of {layer.weight.numel()} weights are off their grid")
    counts = _check_products(model, units, batch, forward, report)
    return replace(report, coverage=cover(model, counts))


def _check_products(
    model: nn.Module, units: dict[str, fx.GraphModule], batch: Any, forward: Forward, report: AuditReport
) -> dict[Place, int]:
    """Check values in a run of the model as it is, then products in one node by node, whose totals must be the same.

    Returns: multiply-accumulates by place.
    """
    whole = MacCounter()
    with intercepted(units, lambda name, call, args, kwargs: counted(whole, (name,), call, args, kwargs)), whole:
        _check_values(model, batch, forward, report)
    nodes = count_macs(model, batch, forward)
    for name, unit in units.items():
        in_nodes = {node: nodes.counts.get((name, node.name), 0) for node in unit.graph.nodes}
        if sum(in_nodes.values()) != whole.counts.get((name,), 0):
            report.problems.append(f"{name}: what it computes is not what its graph says; call `recompile()`")
        index = GraphIndex(unit, unit.graph)
        for node, count in in_nodes.items():
            hidden = nodes.hidden.get((name, node.name))
            if (count or hidden) and not may_multiply(index, node):
                what = f"{count:,} multiply-accumulates" if count else f"{', '.join(sorted(hidden))}"
                report.problems.append(f"{name}.{node_name(node)}: {what} in floating point")
    return dict(nodes.counts)


def _check_values(model: nn.Module, batch: Any, forward: Forward, report: AuditReport) -> None:
    counts: dict[str, int] = defaultdict(int)
    problems: dict[str, str] = {}
    calls: set[str] = set()

    def compare(name: str, quantizer: FakeQuantize, x: Tensor, out: Tensor) -> None:
        if not is_weight(quantizer) or name not in calls:
            counts[quantizer.role] += out.numel()
        calls.add(name)
        if not bool(torch.isfinite(x).all()):
            problems.setdefault(name, "its input holds NaN or infinite values")
            return
        expected = quantizer.decode(quantizer.encode(x)).to(out.dtype)
        if not torch.equal(out, expected):
            share = float((out != expected).float().mean())
            problems.setdefault(name, f"{share:.2%} of its output differs from decode(encode(input))")
        elif not torch.equal(quantizer.decode(quantizer.encode(out)).to(out.dtype), out):
            problems.setdefault(name, "its output is not on the grid")

    with watched(dict(quantizers(model)), compare), naming_item("batch"):
        output = forward(model, to_device(batch, model_device(model)))
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        report.problems.append("the model's output holds NaN or infinite values")
    per_role: dict[str, int] = defaultdict(int)
    for name, quantizer in quantizers(model):
        per_role[quantizer.role] += 1
        if name not in calls:
            problems[name] = "no data reaches it"
    report.problems.extend(f"{name}: {problem}" for name, problem in problems.items())
    report.counts.update(counts)
    report.quantizers.update(per_role)
