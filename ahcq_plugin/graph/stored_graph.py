# SPDX-License-Identifier: Apache-2.0
"""A ``torch.fx.Graph`` as plain tuples that can be pickled, and back: functions by reference, nodes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate, map_arg

_KEPT = ("nn_module_stack",)


@dataclass(frozen=True)
class _Reference:
    """Stands for a node in the arguments of another."""

    name: str


@dataclass(frozen=True)
class StoredNode:
    """One node; ``meta`` has what messages need."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    stack_trace: str | None
    meta: dict[str, Any]


def stored(graph: fx.Graph) -> list[StoredNode]:
    """The nodes of ``graph``, in order."""
    return [
        StoredNode(
            node.op,
            node.name,
            node.target,
            map_arg(node.args, _refer),
            map_arg(node.kwargs, _refer),
            node.stack_trace,
            {key: node.meta[key] for key in _KEPT if key in node.meta},
        )
        for node in graph.nodes
    ]


def graph_of(nodes: list[StoredNode]) -> fx.Graph:
    """The graph of ``nodes``, with the same names."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Reference) else value

    for node in nodes:
        args, kwargs = map_aggregate(node.args, resolve), map_aggregate(node.kwargs, resolve)
        new = graph.create_node(node.op, node.target, args, kwargs, node.name)
        new.meta.update(node.meta)
        if node.stack_trace is not None:
            new.stack_trace = node.stack_trace
        made[node.name] = new
    return graph


def _refer(node: fx.Node) -> _Reference:
    return _Reference(node.name)
