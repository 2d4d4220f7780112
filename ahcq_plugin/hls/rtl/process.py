# SPDX-License-Identifier: Apache-2.0
"""A function of LLVM IR as an XLS process: one turn a cycle, from cut to cut of its control flow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ahcq_plugin.hls.rtl.balance import balance
from ahcq_plugin.hls.rtl.channels import Channels, Port, Ram
from ahcq_plugin.hls.rtl.control import Control
from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.floats import ir_of
from ahcq_plugin.hls.rtl.llvm_module import IGNORED, Module
from ahcq_plugin.hls.rtl.llvm_types import Function, Instruction, Local, Number, Type, Value
from ahcq_plugin.hls.rtl.loops import Pragma
from ahcq_plugin.hls.rtl.memory import Memories
from ahcq_plugin.hls.rtl.names import Names
from ahcq_plugin.hls.rtl.nodes import Graph, Node
from ahcq_plugin.hls.rtl.package import ARGUMENTS, Process, identifier, package_text, port_name
from ahcq_plugin.hls.rtl.pipelined import PipelinedLoops
from ahcq_plugin.hls.rtl.pointers import write_out_choices, write_out_copies
from ahcq_plugin.hls.rtl.storage import Storage
from ahcq_plugin.hls.rtl.values import Outside, Values


def translate(
    module: Module,
    function: Function,
    pragmas: Sequence[Pragma],
    pipelined: Iterable[Place] = (),
    name: str = "process",
) -> Process:
    """The XLS process of ``function``.

    Args:
        pragmas: of all its files.
        pipelined: where loops with a PIPELINE pragma begin.
        name: of the process and the module that XLS makes of it.
    Raises:
        RtlError: the function is outside the subset, or a loop with PIPELINE cannot run at II = 1.
    """
    return _Translation(module, function, pragmas, frozenset(pipelined)).process(name)


@dataclass(eq=False)
class _State:
    bits: int
    read: Node
    next: Node | None = None


@dataclass(eq=False)
class _Translation:
    module: Module
    function: Function
    pragmas: Sequence[Pragma]
    pipelined: frozenset[Place]
    states: dict[str, _State] = field(default_factory=dict)
    values: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], Node] = field(default_factory=dict)
    active: dict[str, Node] = field(default_factory=dict)
    extra: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = Graph()
        self.compute = Values(self.graph)
        self.channels = Channels(self.graph)
        write_out_copies(self.module, self.function)
        write_out_choices(self.module, self.function)
        self.control = Control(self.function)
        self.loops = PipelinedLoops(self.module, self.control, self.pipelined)
        self.loops.check()
        self.memories = Memories(self.module, self.function, self.control, self.pragmas)
        self.control.split(self._ports_of, self._split)
        self.names = Names(self.function, self.control, self.memories)
        self.may, self.must = self.control.reaching()
        self.block_of = {one: name for name, block in self.control.blocks.items() for one in block.instructions}
        self.home = {one.result: name for one, name in self.block_of.items() if one.result}
        self.home |= {name: self.control.entry for name, _ in self.function.arguments}
        self.storage = Storage(self, self.memories)
        self.ports: dict[tuple[str, int], tuple[bool, int]] = {}

    # -- places and what the flow refuses

    def place(self, one: Instruction) -> Place:
        return self.module.place(one.debug)

    def stream(self, value: Value, one: Instruction) -> tuple[str, int]:
        """(argument, index) of the stream that an instruction uses."""
        pointer = self.memories.pointer(value, one)
        if pointer.terms or pointer.is_global or pointer.base not in dict(self.function.arguments):
            raise RtlError(
                "a stream that is chosen at run time, or is no argument of the process: unroll the loop over streams",
                self.place(one),
            )
        return pointer.base, pointer.fixed

    def _ports_of(self, one: Instruction) -> tuple[list, list]:
        """What an instruction uses, and what must not have been used before it in a turn."""
        if one.op == "call" and one.detail in ("__hls_pop", "__hls_push"):
            stream = self.stream(one.args[0][1], one)
            return ([stream, "sent"], [stream]) if one.detail == "__hls_push" else ([stream], [stream, "sent"])
        access = self.memories.of.get(one)
        if access is None or access.array.kind != "ram":
            return [], []
        ports = [(column, access.is_write) for column in access.columns]
        return ports, ports

    def _split(self, block: str, first: Instruction, second: Instruction) -> bool:
        """Whether to end a turn before ``second``: a port is used twice, or a stream is read after another was written.

        What is read may be an answer to what was written, so it must not hold that back. In a loop with PIPELINE the
        schedule sees to it.
        """
        if self.memories.is_same_word(first, second):
            return False
        if (place := self.loops.pipelined(block)) is not None:
            if (first.detail, second.detail) == ("__hls_push", "__hls_pop"):
                return False
            access = self.memories.of.get(second)
            what = f"array `{access.array.name}`" if access else f"stream `{self.stream(second.args[0][1], second)[0]}`"
            hint = "partition it, or make its words wider" if access else "use it once a turn"
            raise RtlError(
                f"II = 1 is impossible: the {what} is used twice in a turn of this loop, at {self.place(first)} and "
                f"{self.place(second)}; {hint}",
                place,
            )
        self.extra.append(self.place(second))
        return True

    # -- state and values

    def state(self, name: str, bits: int) -> _State:
        """A state element, made at its first use."""
        if name not in self.states:
            self.states[name] = _State(bits, self.graph.node("state_read", bits, [], f"state_element={name}"))
        return self.states[name]

    def value(self, kind: Type, value: Value, block: str) -> Node:
        """A value as it is at a block."""
        if isinstance(value, Number):
            return self.graph.literal(kind.bits or 1, value.value)
        if not isinstance(value, Local):
            raise Outside("an address as a number")
        name, home = value.name, self.home[value.name]
        if name in self.kept:
            return self.states[self.kept[name]].read
        if home == block or home in self.must[block]:
            return self.values[name]
        held = self.states[self.held[name]].read
        return self.graph.select(self.active[home], self.values[name], held) if home in self.may[block] else held

    # -- the process

    def process(self, name: str) -> Process:
        graph, control = self.graph, self.control
        live = self.names.live()
        self.kept = {
            phi.result: f"at_{identifier(phi.result)}"
            for cut in control.cuts
            for phi in control.blocks[cut].phis
            if self.names.is_word(phi.result)
        }
        held = sorted(set().union(*(live[cut] for cut in control.cuts)) - set(self.kept))
        self.held = {value: f"held_{identifier(value)}" for value in held}
        for value, state in (*self.kept.items(), *self.held.items()):
            self.state(state, self.names.width(value))
        places = [control.entry, *control.cuts]
        bits = max(1, (len(places) - 1).bit_length())
        if control.cuts:
            pc = self.state("place", bits).read
            starts = {block: graph.node("eq", 1, [pc, graph.literal(bits, i)]) for i, block in enumerate(places)}
        else:
            starts = {control.entry: graph.one}
        self._arguments(starts[control.entry])
        for block in control.order:
            self._block(block, starts)
        for value, state in self.held.items():
            element = self.states[state]
            element.next = graph.select(self.active[self.home[value]], self.values[value], element.read)
        self._phis()
        if control.cuts:
            following = graph.literal(bits, 0)
            for index, cut in enumerate(control.cuts, 1):
                coming = graph.any(*(self.edges[one, cut] for one in control.predecessors[cut]))
                following = graph.select(coming, graph.literal(bits, index), following)
            self.states["place"].next = following
        rams = self.storage.finish()
        self._order()
        self.channels.finish()
        return self._made(name, rams)

    def _arguments(self, start: Node) -> None:
        self.scalars = [(name, kind.bits) for name, kind in self.function.arguments if kind.is_scalar]
        odd = [kind.kind for _, kind in self.function.arguments if not kind.is_scalar and kind.kind != "ptr"]
        if odd:
            raise RtlError(f"an argument of the type {odd[0]}", self.module.function_place(self.function))
        if not self.scalars:
            return
        channel = self.channels.channel(ARGUMENTS, False, sum(bits for _, bits in self.scalars))
        channel.cases.append((start, None))
        channel.places.append((self.control.entry, -1))
        word, at = self.channels.data(channel), 0
        for name, bits in self.scalars:
            self.values[name] = self.graph.slice(word, at, bits)
            at += bits

    def _block(self, name: str, starts: dict[str, Node]) -> None:
        graph, block = self.graph, self.control.blocks[name]
        before = self.control.before(name)
        self.active[name] = starts[name] if name in starts else graph.any(*(self.edges[one, name] for one in before))
        for position, one in enumerate(block.instructions):
            graph.debug = one.debug
            try:
                self._instruction(name, position, one)
            except Outside as error:
                raise RtlError(f"outside the subset of HLS C++: {error}", self.place(one)) from None
        graph.debug = -1

    def _instruction(self, name: str, position: int, one: Instruction) -> None:
        graph = self.graph
        if one.op == "phi":
            if name in self.control.cuts or not self.names.is_word(one.result):
                return
            cases = []
            for (kind, value), label in zip(one.args, one.labels, strict=True):
                if (label, name) in self.edges:
                    kind = kind if kind.is_scalar else Type("int", self.names.width(one.result))
                    cases.append((self.edges[label, name], self.value(kind, value, label)))
            self.values[one.result] = graph.chosen(cases)
        elif one.op in ("br", "switch", "ret", "unreachable"):
            self._leave(name, one)
        elif one.op in ("alloca", "getelementptr") or one.op == "call" and one.detail.startswith(IGNORED):
            return
        elif one in self.memories.of:
            self.storage.access(one, name)
        elif one.op == "call" and one.detail.startswith("__hls_"):
            self._stream_call(name, position, one)
        elif one.result is None:
            raise Outside(f"`{one.op}` {one.detail}".strip())
        elif one.type.kind == "ptr" and self.names.is_word(one.result) and one.op in ("select", "freeze"):
            word = Type("int", self.names.width(one.result))
            nodes = [self.value(word if kind.kind == "ptr" else kind, value, name) for kind, value in one.args]
            self.values[one.result] = nodes[0] if one.op == "freeze" else graph.select(*nodes)
        elif one.type.kind == "ptr" and one.op in ("select", "freeze"):
            return
        else:
            self.values[one.result] = self.compute.compute(one, lambda i: self.value(*one.args[i], name))

    def _leave(self, name: str, one: Instruction) -> None:
        graph, active = self.graph, self.active[name]
        if one.op == "ret" and one.args:
            raise Outside("a top function or process that returns a value")
        outs: list[tuple[str, Node]] = []
        if one.op == "br" and len(one.labels) == 2:
            condition = self.value(*one.args[0], name)
            outs = [
                (one.labels[0], graph.both(active, condition)),
                (one.labels[1], graph.both(active, graph.node("not", 1, [condition]))),
            ]
        elif one.op == "br":
            outs = [(one.labels[0], active)]
        elif one.op == "switch":
            kind, value = one.args[0]
            word, other = self.value(kind, value, name), []
            for (_, case), label in zip(one.args[1:], one.labels[1:], strict=True):
                hit = graph.node("eq", 1, [word, graph.literal(kind.bits, case.value)])
                other.append(hit)
                outs.append((label, graph.both(active, hit)))
            outs.append((one.labels[0], graph.both(active, graph.node("not", 1, [graph.any(*other)]))))
        for target, condition in outs:
            known = self.edges.get((name, target))
            self.edges[name, target] = condition if known is None else graph.any(known, condition)

    def _stream_call(self, name: str, position: int, one: Instruction) -> None:
        graph, what = self.graph, one.detail
        if what in ("__hls_pop", "__hls_push"):
            stream = self.stream(one.args[0][1], one)
            value = one.args[1][1]
            bits = value.value if what == "__hls_pop" else self.names.width(value.name)
            known = self.ports.setdefault(stream, (what == "__hls_push", bits))
            if known[0] != (what == "__hls_push"):
                raise Outside(f"a process that reads and writes the stream `{stream[0]}`")
            channel = self.channels.channel(port_name(self.ports_of_arrays, stream), known[0], bits)
            channel.cases.append((self.active[name], self.value(Type("int", bits), value, name) if known[0] else None))
            channel.places.append((name, position))
            if not known[0]:
                self.values[one.result] = self.channels.data(channel)
            return
        if what == "__hls_new":
            self.values[one.result] = graph.literal(one.args[0][1].value, 0)
            return
        word = self.value(Type("int"), one.args[0][1], name)
        start = one.args[1][1].value
        width = min(one.args[2][1].value if what == "__hls_put" else 64, word.bits - start)
        if what == "__hls_get":
            self.values[one.result] = graph.extend(graph.slice(word, start, width), 64)
        elif what == "__hls_put":
            part = graph.slice(self.value(*one.args[3], name), 0, width)
            parts = [graph.slice(word, start + width, word.bits - start - width)] if start + width < word.bits else []
            parts += [part, *([graph.slice(word, 0, start)] if start else [])]
            self.values[one.result] = graph.concat(parts)
        else:
            raise Outside(f"a call of `{what}`")

    @property
    def ports_of_arrays(self) -> frozenset[str]:
        """Arguments that are arrays of streams."""
        uses = [
            one
            for block in self.control.blocks.values()
            for one in block.instructions
            if one.detail in ("__hls_pop", "__hls_push")
        ]
        return frozenset(base for base, index in (self.stream(one.args[0][1], one) for one in uses) if index)

    def _phis(self) -> None:
        graph = self.graph
        for cut in self.control.cuts:
            for phi in self.control.blocks[cut].phis:
                if phi.result not in self.kept:
                    continue
                element = self.states[self.kept[phi.result]]
                element.next = element.read
                kind = Type("int", element.bits)
                for (_, value), label in zip(phi.args, phi.labels, strict=True):
                    if (label, cut) in self.edges:
                        now = self.value(kind, value, label)
                        element.next = graph.select(self.edges[label, cut], now, element.next)

    def _shown(self, state: str) -> str:
        """The C++ variable and the line of its declaration, for a state."""
        for value, name in (*self.kept.items(), *self.held.items()):
            if name == state:
                shown, place = self.module.variable(self.function, value)
                return f"{shown} ({place})" if place.line else shown
        return state.removeprefix("mem_")

    def _order(self) -> None:
        conflicts = self.channels.order(lambda a, b: a in self.may[b])
        if conflicts:
            a, b = conflicts[0]
            raise RtlError(
                f"two branches use the streams `{a.name}` and `{b.name}` in different orders; use one order in both",
                self.module.function_place(self.function),
            )

    def _made(self, name: str, rams: list[Ram]) -> Process:
        graph = self.graph
        for state, element in self.states.items():
            if element.next is None:
                raise AssertionError(state)
            graph.root("next_value", "()", [element.next], f"param={state}")
        balance(graph, {state: (element.read, element.next) for state, element in self.states.items()})
        kept = {n: (e.read.kind, self.storage.initial.get(n, "0")) for n, e in self.states.items()}
        floats = ir_of(frozenset(self.compute.functions)) if self.compute.functions else ""
        text = package_text(name, kept, self.channels.declarations, floats, graph)
        streams = [
            Port(port_name(self.ports_of_arrays, stream), *self.ports[stream], *stream)
            for argument, _ in self.function.arguments
            for stream in sorted(self.ports)
            if stream[0] == argument
        ]
        return Process(
            name,
            text,
            tuple(streams),
            tuple(self.scalars),
            tuple(rams),
            tuple(self.channels.constraints),
            graph,
            {state: (element.read, element.next) for state, element in self.states.items()},
            self.module,
            {state: self._shown(state) for state in self.states},
            tuple(self.extra),
        )
