# SPDX-License-Identifier: Apache-2.0
"""What a function becomes: a package of XLS IR, and all that stands beside its process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ahcq_plugin.hls.rtl.channels import Port, Ram
from ahcq_plugin.hls.rtl.errors import Place
from ahcq_plugin.hls.rtl.llvm_module import Module
from ahcq_plugin.hls.rtl.nodes import Graph, Node

ARGUMENTS = "args"


@dataclass(frozen=True, eq=False)
class Process:
    """What XLS schedules.

    Attributes:
        name: of the function.
        ir: a package of XLS IR with the process on top.
        ports: streams, in the order of the arguments.
        arguments: scalar arguments (name, bits), first one lowest in the word of the channel ``args``.
        rams: memories beside it.
        constraints: of the schedule, as XLS takes them.
        graph, states: of the process, for messages: state name -> (its value, its next value).
        module: for places of nodes.
        variables: C++ variable of each state.
        extra_turns: places before which a turn ends because a port is used a second time.
    """

    name: str
    ir: str
    ports: tuple[Port, ...]
    arguments: tuple[tuple[str, int], ...]
    rams: tuple[Ram, ...]
    constraints: tuple[str, ...]
    graph: Graph
    states: dict[str, tuple[Node, Node]]
    module: Module
    variables: dict[str, str]
    extra_turns: tuple[Place, ...] = ()


def package_text(
    name: str, states: Mapping[str, tuple[str, str]], channels: Sequence[str], functions: str, graph: Graph
) -> str:
    """XLS IR of a process.

    Args:
        states: name -> (type, initial value).
        channels: their declarations.
        functions: IR of what the process calls.
    """
    elements = ", ".join(f"{state}: {kind}" for state, (kind, _) in states.items())
    inits = ", ".join(initial for _, initial in states.values())
    head = f"top proc {name}({elements}, init={{{inits}}}) {{" if states else f"top proc {name}() {{"
    return "\n".join([f"package {name}", "", *channels, "", functions, head, *graph.text(), "}", ""])


def port_name(arrays: frozenset[str], stream: tuple[str, int]) -> str:
    """The name of a stream's port: that of the argument, with the index where it is an array."""
    name = identifier(stream[0])
    return f"{name}_{stream[1]}" if stream[0] in arrays else name


def identifier(name: str) -> str:
    """``name`` with an underscore for whatever no name in Verilog has."""
    return re.sub(r"\W", "_", name)
