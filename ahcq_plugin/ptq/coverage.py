# SPDX-License-Identifier: Apache-2.0
"""How much of a prepared model computes on integers, and by name what does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.allowed import is_left, node_name
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.positions import exception_of, position_table
from ahcq_plugin.ptq.macs import Place
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.quantizers.layers import held_weight

INTEGERS, IN_UNITS, OUTSIDE = "integers", "float in units", "outside units"
KINDS = (INTEGERS, IN_UNITS, OUTSIDE)
_DEPTH = 2  # components of a module's name that a part outside of units is named by


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: the role or layer kind inside units, the module outside of them.
        kind: ``integers``, ``float in units`` or ``outside units``.
        weights: number of parameter elements.
        macs: multiply-accumulates of one item; None where nothing ran.
    """

    name: str
    kind: str
    weights: int
    macs: int | None


@dataclass(frozen=True)
class Coverage:
    """Parts of a model, those on integers first, then by multiply-accumulates and weights."""

    parts: tuple[Part, ...]

    def share(self, kind: str, of: str = "weights") -> float | None:
        """Share of ``kind`` in all ``weights`` or ``macs``, in [0, 1]; None where none were counted."""
        total = sum(getattr(part, of) or 0 for part in self.parts)
        return sum(getattr(p, of) or 0 for p in self.parts if p.kind == kind) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """Shares by kind and all parts, plain values."""
        shares = {kind: {of: self.share(kind, of) for of in ("weights", "macs")} for kind in KINDS}
        return {"shares": shares, "parts": [asdict(part) for part in self.parts]}

    def __str__(self) -> str:
        rows = []
        for kind in KINDS:
            weights, macs = (self.share(kind, of) for of in ("weights", "macs"))
            numbers = [f"{weights:.2%} of the weights"] if weights is not None else []
            numbers += [f"{macs:.2%} of the multiply-accumulates"] if macs is not None else []
            names = [p.name for p in self.parts if p.kind == kind]
            rows.append(f"{kind}: {', '.join(numbers)}" + (f" ({', '.join(names)})" if kind != INTEGERS else ""))
        return "\n".join(rows)


def cover(model: nn.Module, macs: Mapping[Place, int] | None = None) -> Coverage:
    """Divide a prepared model into what computes on integers, in floating point inside units, and outside of them.

    Args:
        macs: as counted by ``count_macs``; None: weights alone.
    """
    units = prepared_units(model)
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for unit_name, unit in units.items():
        for label, kind, weights in _weights_of(unit):
            sums[kind, label][0] += weights
        index = GraphIndex(unit, unit.graph)
        for node in unit.graph.nodes:
            count = (macs or {}).get((unit_name, node.name), 0)
            if count:
                sums[_kind_of(index, node)][1] += count
    inside = {id(p) for unit in units.values() for p in unit.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            sums[OUTSIDE, _part_name(name)][0] += parameter.numel()
    for place, count in (macs or {}).items():
        if len(place) == 1 and count:
            sums[OUTSIDE, _part_name(place[0])][1] += count
    parts = [Part(name, kind, w, m if macs is not None else None) for (kind, name), (w, m) in sums.items()]
    parts.sort(key=lambda part: (KINDS.index(part.kind), -(part.macs or 0), -part.weights, part.name))
    return Coverage(tuple(parts))


def _part_name(module: str) -> str:
    return ".".join(module.split(".")[:_DEPTH]) or "the model itself"


def _weights_of(unit: fx.GraphModule) -> list[tuple[str, str, int]]:
    """(label, kind, elements) of the parameters of a unit; those of fake quantizers are no weights of the model."""
    index = GraphIndex(unit, unit.graph)
    tables = {node.target: position_table(index, node) for node in unit.graph.nodes if node.op == "get_attr"}
    quantized: dict[str, int] = defaultdict(int)
    for name, layer in weight_layers(unit).items():
        quantized[held_weight(name, layer)[0]] += layer.weight.numel()
    learned = {
        f"{prefix}.{name}"
        for prefix, module in unit.named_modules()
        if isinstance(module, FakeQuantize)
        for name, _ in module.named_parameters()
    }
    rows = []
    for name, parameter in unit.named_parameters():
        if name in learned:
            continue
        if name in quantized:
            rows.append(("Linear and Conv2d", INTEGERS, quantized[name]))
            if quantized[name] < parameter.numel():  # rows of it that no layer reads
                rows.append((f"left: {name}", IN_UNITS, parameter.numel() - quantized[name]))
        elif sum(size > 1 for size in parameter.shape) < 2:
            rows.append(("norms, biases, scales", IN_UNITS, parameter.numel()))
        else:
            rows.append((tables.get(name) or f"left: {name}", IN_UNITS, parameter.numel()))
    return rows


def may_multiply(index: GraphIndex, node: fx.Node) -> bool:
    """Whether a node that multiplies matrices is a quantized layer, a matmul, an exception or left by the caller."""
    kind, _ = _kind_of(index, node)
    return kind == INTEGERS or bool(exception_of(index, node)) or is_left(index.root, node)


def _kind_of(index: GraphIndex, node: fx.Node) -> tuple[str, str]:
    """(kind, label) of a node of a prepared unit, which ``index`` is of, that multiplies."""
    exception = exception_of(index, node)
    if exception:
        return IN_UNITS, exception
    layer = index.module(node)
    if isinstance(getattr(layer, "weight_fake_quant", None), FakeQuantize):
        return INTEGERS, "Linear and Conv2d"
    if index.is_matmul(node) and not is_left(index.root, node):
        return INTEGERS, "attention matmuls"
    return IN_UNITS, f"left: {node_name(node)}"
