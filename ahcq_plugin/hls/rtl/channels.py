# SPDX-License-Identifier: Apache-2.0
"""Streams and memories of a process as XLS channels: one operation each, whatever branch uses it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ahcq_plugin.hls.rtl.memory import Column
from ahcq_plugin.hls.rtl.nodes import Graph, Node


@dataclass(frozen=True)
class Port:
    """A stream of a process: its name, whether the process writes it, its width, the argument and the index in it."""

    name: str
    is_output: bool
    bits: int
    argument: str
    index: int


@dataclass(frozen=True)
class Ram:
    """A memory beside a process.

    Attributes:
        forwarded: it is read and written by channels of their own (read-modify-write); else one request does both.
    """

    name: str
    depth: int
    bits: int
    forwarded: bool

    @property
    def address_bits(self) -> int:
        """At least 1."""
        return max(1, (self.depth - 1).bit_length())


@dataclass(eq=False)
class Channel:
    """One operation on a channel, and the branches in which it runs: (condition, data)."""

    name: str
    is_output: bool
    bits: int
    node: Node
    cases: list[tuple[Node, Node | None]] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)  # (block, position)
    before: dict[Channel, None] = field(default_factory=dict)


class Channels:
    """Collects operations; ``finish`` fills in what is only known at the end."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.start = graph.node("after_all", "token")
        self.used: dict[str, Channel] = {}
        self.constraints: list[str] = []
        self.declarations: list[str] = []

    def channel(self, name: str, is_output: bool, bits: int) -> Channel:
        """The operation on a channel, made at its first use."""
        if name not in self.used:
            op, kind = ("send", "token") if is_output else ("receive", f"(token, bits[{bits}])")
            node = self.graph.root(op, kind, [], f"channel={name}")
            self.used[name] = Channel(name, is_output, bits, node)
        return self.used[name]

    def data(self, channel: Channel) -> Node:
        """What a receive gives."""
        return self.graph.node("tuple_index", channel.bits, [channel.node], "index=1")

    def token(self, channel: Channel) -> Node:
        """The token after an operation."""
        return channel.node if channel.is_output else self.graph.node("tuple_index", "token", [channel.node], "index=0")

    def finish(self) -> None:
        """Fill in tokens, conditions and data, and declare the channels."""
        for channel in self.used.values():
            tokens = [self.token(one) for one in channel.before]
            token = self.graph.node("after_all", "token", tokens) if tokens else self.start
            channel.node.args = [token]
            if channel.is_output:
                channel.node.args.append(self.graph.chosen(channel.cases))
            condition = self.graph.any(*(case for case, _ in channel.cases))
            channel.node.predicate = None if condition is self.graph.one else condition
            ops = "send_only" if channel.is_output else "receive_only"
            self.declarations.append(
                f"chan {channel.name}(bits[{channel.bits}], id={len(self.declarations)}, kind=streaming, ops={ops}, "
                "flow_control=ready_valid)"
            )

    def order(self, reaches) -> list[tuple[Channel, Channel]]:
        """Make operations keep the order of C++: what may run before another in a turn comes before it.

        Args:
            reaches: whether a block may run before another in a turn.
        Returns:
            Pairs that come in both orders in different branches.
        """
        channels = list(self.used.values())
        conflicts = []
        for index, a in enumerate(channels):
            for b in channels[index + 1 :]:
                forth, back = _precedes(a, b, reaches), _precedes(b, a, reaches)
                if forth and back:
                    conflicts.append((a, b))
                elif forth or back:
                    first, second = (a, b) if forth else (b, a)
                    if first.is_output and second.is_output:
                        continue
                    second.before[first] = None
                    if first.is_output and not second.is_output:
                        self.constraints.append(f"{first.name}:send:{second.name}:recv:1:none")
        return conflicts

    def ram(self, columns: list[Column], reads: list, writes: list, forwarded: bool, turn: list) -> Ram:
        """The channels of a memory whose accesses are known.

        Args:
            columns: those that are always used together; their words lie side by side, the first lowest.
            reads: (condition, address, [for each column (node that stands for the word, earlier writes of the turn)]).
            writes: (condition, address, data of all columns).
            forwarded: whether what is written needs what is read in the same turn.
            turn: collects the state of the forwarding: (state name, bits, next value).
        """
        graph, name, distance = self.graph, columns[0].name, columns[0].array.distance
        ram = Ram(name, columns[0].depth, sum(column.bits for column in columns), forwarded)
        width = ram.address_bits
        read = graph.any(*(case[0] for case in reads))
        address = graph.chosen([(case[0], case[1]) for case in reads])
        write = graph.any(*(case[0] for case in writes))
        target = graph.chosen([(case[0], case[1]) for case in writes]) if writes else graph.literal(width, 0)
        data = graph.chosen([(case[0], case[2]) for case in writes]) if writes else graph.literal(ram.bits, 0)
        answer = self.channel(f"{name}_answer", False, ram.bits)
        answer.cases.append((read, None))
        self.constraints.append(f"{name}_ask:send:{name}_answer:recv:1:1")
        if not forwarded:
            ask = self.channel(f"{name}_ask", True, 2 + 2 * width + ram.bits)
            ask.cases.append((graph.any(read, write), graph.concat([read, address, write, target, data])))
        else:
            ask = self.channel(f"{name}_ask", True, width)
            ask.cases.append((read, address))
            put = self.channel(f"{name}_put", True, width + ram.bits)
            put.cases.append((write, graph.concat([target, data])))
            put.before[answer] = None
            # a read comes after the writes of all turns but the last 1 + the latency from answer to write
            if distance is None or distance == 1:
                self.constraints.append(f"{name}_answer:recv:{name}_put:send:0:0")
            elif distance > 1:
                self.constraints.append(f"{name}_answer:recv:{name}_put:send:0:{distance - 2}")
        answer.before[ask] = None
        word = self.data(answer)
        if forwarded and (distance is None or distance == 1):
            last = {}
            for part, bits, value in (("valid", 1, write), ("address", width, target), ("data", ram.bits, data)):
                last[part] = graph.node("state_read", bits, [], f"state_element={name}_last_{part}")
                turn.append((f"{name}_last_{part}", last[part], value))
            same = graph.both(last["valid"], graph.node("eq", 1, [last["address"], address]))
            word = graph.select(same, last["data"], word)
        for _, where, stands in reads:
            at = 0
            for column, (place, earlier) in zip(columns, stands, strict=True):
                value = graph.slice(word, at, column.bits)
                for condition, index, written in earlier:
                    value = graph.select(graph.both(condition, graph.node("eq", 1, [index, where])), written, value)
                place.args = [value]
                at += column.bits
        return ram


def _precedes(a: Channel, b: Channel, reaches) -> bool:
    return any(
        one == other and at < then or one != other and reaches(one, other)
        for one, at in a.places
        for other, then in b.places
    )
