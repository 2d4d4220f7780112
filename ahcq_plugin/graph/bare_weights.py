# SPDX-License-Identifier: Apache-2.0
"""``F.linear`` on a parameter becomes a Linear that reads that parameter, so that all else finds an ordinary layer.

BEiT, EVA-02 and Swin V2 call ``F.linear(x, self.qkv.weight, a bias put together of parts)``; attention by
``nn.MultiheadAttention`` holds one matrix for all projections, of which it may use parts.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.quantizers.layers import LinearView


@dataclass(frozen=True)
class _Rows:
    """Rows ``start`` to ``stop`` of the parameter at ``path``."""

    path: str
    start: int
    stop: int


def layer_bare_weights(source: nn.Module, traced: fx.GraphModule) -> list[str]:
    """Replace calls of ``F.linear`` on a matrix parameter, or rows of it, by calls of layers, in place.

    A matrix that is the whole weight of an ``nn.Linear`` of ``source`` is called as that Linear; any other by a
    ``LinearView`` beside it, named like the parameter (``in_proj_weight`` -> ``in_proj``, parts ``in_proj_0_64``). The
    layer adds the bias where that is a parameter and the same in all calls; else the graph does. Parameters and their
    names stay as they are. What does not fit stays as it was: rows that overlap, a matrix whose Linear is called too
    and adds another bias, a slice with a step.

    Args:
        source: what was traced.
        traced: the unit, with its state (``keep_state``).
    Returns:
        Names of the layers that are called now.
    """
    calls: dict[_Rows, list[fx.Node]] = defaultdict(list)
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is F.linear:
            rows = _rows(traced, _argument(node, 1, "weight"), 2)
            if rows is not None:
                calls[rows].append(node)
    names = []
    for rows, nodes in calls.items():
        if any(other.path == rows.path and other != rows and _overlap(other, rows) for other in calls):
            continue
        added = {_rows(traced, _argument(node, 2, "bias"), 1) for node in nodes}
        bias = added.pop() if len(added) == 1 else None
        name = _own_linear(source, traced, rows, bias) or _view(source, traced, rows, bias)
        if name is not None:
            for node in nodes:
                _replace(traced, node, name)
            names.append(name)
    if names:
        traced.graph.lint()
        traced.recompile()
    return names


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _rows(traced: fx.GraphModule, node: Any, ndim: int) -> _Rows | None:
    """The rows of a parameter of ``ndim`` dimensions that a node is: get_attr, or a slice of one."""
    part = slice(None)
    if isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem:
        node, part = node.args
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not isinstance(part, slice):
        return None
    tensor = operator.attrgetter(node.target)(traced)
    fixed = all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))
    if not isinstance(tensor, nn.Parameter) or tensor.ndim != ndim or not fixed or part.step not in (None, 1):
        return None
    start, stop, _ = part.indices(len(tensor))
    return _Rows(node.target, start, stop) if start < stop else None


def _overlap(a: _Rows, b: _Rows) -> bool:
    return a.start < b.stop and b.start < a.stop


def _is_called(traced: fx.GraphModule, parameter: nn.Parameter) -> set[str]:
    """Names of the modules that the unit calls and that hold ``parameter``."""
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    return {name for name in called if any(p is parameter for p in traced.get_submodule(name).parameters())}


def _own_linear(source: nn.Module, traced: fx.GraphModule, rows: _Rows, bias: _Rows | None) -> str | None:
    """Name of the Linear whose whole weight ``rows`` are, put into ``traced``; None: no Linear does the same."""
    owner, _, attribute = rows.path.rpartition(".")
    linear = source.get_submodule(owner)
    parameter = linear.get_parameter(attribute)
    if not owner or not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return None
    if attribute != "weight" or (rows.start, rows.stop) != (0, len(parameter)):
        return None
    if linear.bias is not None and bias != _Rows(f"{owner}.bias", 0, len(parameter)):
        return None
    if _is_called(traced, parameter) - {owner}:
        return None
    parent, _, child = owner.rpartition(".")
    setattr(traced.get_submodule(parent), child, linear)  # shared, as fx shares leaves
    return owner


def _view(source: nn.Module, traced: fx.GraphModule, rows: _Rows, bias: _Rows | None) -> str | None:
    """Name of a new layer on ``rows`` in ``traced``; None where another layer reads that matrix."""
    owner, _, attribute = rows.path.rpartition(".")
    holder = traced.get_submodule(owner)
    parameter = holder.get_parameter(attribute)
    if _is_called(traced, parameter) or holder is source.get_submodule(owner):
        return None
    stem = attribute.removesuffix("_weight") if attribute != "weight" else "linear"
    if (rows.start, rows.stop) != (0, len(parameter)):
        stem += f"_{rows.start}_{rows.stop}"
    while hasattr(holder, stem) or hasattr(source.get_submodule(owner), stem):
        stem += "_"
    bias_parameter = None
    bias_part = slice(None)
    if bias is not None and bias.stop - bias.start == rows.stop - rows.start:
        bias_parameter, bias_part = operator.attrgetter(bias.path)(traced), slice(bias.start, bias.stop)
    view = LinearView(attribute, parameter, slice(rows.start, rows.stop), bias_parameter, bias_part)
    holder.add_module(stem, view)
    return f"{owner}.{stem}".lstrip(".")


def _replace(traced: fx.GraphModule, node: fx.Node, name: str) -> None:
    bias = _argument(node, 2, "bias")
    with traced.graph.inserting_before(node):
        made = [traced.graph.call_module(name, (_argument(node, 0, "input"),))]
        if bias is not None and traced.get_submodule(name).bias is None:
            made.append(traced.graph.call_function(operator.add, (made[0], bias)))
    for new in made:
        new.meta.update(node.meta)
        new.stack_trace = node.stack_trace
    node.replace_all_uses_with(made[-1])
    _erase_unused(traced.graph, node)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and the reads of parameters that were made for it alone."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for read in inputs:
        if not read.users and (read.op == "get_attr" or read.target is operator.getitem):
            _erase_unused(graph, read)
