# SPDX-License-Identifier: Apache-2.0
"""What a top function is made of: the processes of its DATAFLOW body, and the streams and scalars that join them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.llvm_module import IGNORED, Module
from ahcq_plugin.hls.rtl.llvm_types import Address, Function, Instruction, Local, Number, Type, Value
from ahcq_plugin.hls.rtl.loops import Pragma, about, number
from ahcq_plugin.hls.rtl.package import Process
from ahcq_plugin.hls.rtl.process import translate

DEFAULT_DEPTH = 2  # of a stream without a pragma, as in Vitis


@dataclass(eq=False)
class Stream:
    """A FIFO, or a port of the design: its ends are (instance, port of the process)."""

    name: str
    depth: int
    is_port: bool
    place: Place
    writer: tuple[Instance, str] | None = None
    reader: tuple[Instance, str] | None = None
    bits: int = 0


@dataclass(frozen=True)
class Slice:
    """A scalar of a process: bits of the top's arguments."""

    start: int
    bits: int


@dataclass(eq=False)
class Instance:
    """A process in a design: the streams of its ports, and where its scalars come from."""

    name: str
    process: Process
    streams: dict[str, Stream] = field(default_factory=dict)
    scalars: list[Slice | int] = field(default_factory=list)

    @property
    def is_launched(self) -> bool:
        """Whether it waits for the arguments of the top."""
        return any(isinstance(one, Slice) for one in self.scalars)


@dataclass(eq=False)
class Group:
    """Streams that a C++ variable names: one, or an array, by index."""

    name: str
    depth: int
    is_port: bool
    place: Place
    start: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)
    array: bool = False


@dataclass(frozen=True, eq=False)
class Design:
    """A top function as hardware.

    Attributes:
        arguments: scalars of the top: (name, bits), first one lowest.
        ports: its streams, in the order of the arguments.
        instances, fifos: what is inside.
        processes: each process once, by its name.
    """

    top: str
    arguments: tuple[tuple[str, int], ...]
    ports: tuple[Stream, ...]
    instances: tuple[Instance, ...]
    fifos: tuple[Stream, ...]
    processes: dict[str, Process]


def elaborate(module: Module, top: str, pragmas: Sequence[Pragma], pipelined: Sequence[Place]) -> Design:
    """The design of the function ``top`` (its C++ name, without namespaces and template arguments).

    Raises:
        RtlError: there is no such function, it or a process is outside the subset, or a stream has not one writer and
            one reader.
    """
    return _Elaboration(module, pragmas, pipelined).design(top)


class _Elaboration:
    def __init__(self, module: Module, pragmas: Sequence[Pragma], pipelined: Sequence[Place]):
        self.module, self.pragmas, self.pipelined = module, pragmas, pipelined
        self.instances: list[Instance] = []
        self.fifos: list[Group] = []
        self.processes: dict[str, Process] = {}
        self._names: set[str] = set()

    def design(self, top: str) -> Design:
        function = self._find(top)
        ports: dict[str, Group] = {}
        scalars: dict[str, Slice | int] = {}
        arguments, at = [], 0
        for name, kind in function.arguments:
            if kind.kind == "ptr":
                ports[name] = Group(name, 0, True, self.module.function_place(function))
            else:
                scalars[name] = Slice(at, kind.bits)
                arguments.append((name, kind.bits))
                at += kind.bits
        self._function(function, ports, scalars, top, top)
        streams = [
            ports[name].streams[i]
            for name, _ in function.arguments
            if name in ports
            for i in sorted(ports[name].streams)
        ]
        fifos = [group.streams[index] for group in self.fifos for index in sorted(group.streams)]
        for stream in (*streams, *fifos):
            self._check(stream)
        return Design(top, tuple(arguments), tuple(streams), tuple(self.instances), tuple(fifos), self.processes)

    def _find(self, top: str) -> Function:
        found = [one for one in self.module.functions.values() if top in (one.name, self.module.short_name(one))]
        if len(found) != 1:
            names = sorted({self.module.short_name(one) for one in self.module.functions.values()})
            raise RtlError(f"the top function `{top}` is there {len(found)} times; functions: {', '.join(names)}")
        return found[0]

    def _calls(self, function: Function) -> list[Instruction]:
        every = [one for block in function.blocks.values() for one in block.instructions]
        return [one for one in every if one.op == "call" and one.detail in self.module.functions]

    def _function(
        self, function: Function, streams: dict[str, Group], scalars: dict[str, Slice | int], name: str, path: str
    ) -> None:
        if not self._calls(function):
            self._process(function, streams, scalars, path)
            return
        groups = dict(streams)
        if len(function.blocks) > 1:
            place = self.module.place(next(iter(function.blocks.values())).last.debug)
            raise RtlError("a loop or a branch in a DATAFLOW body: unroll it, or put it into a process", place)
        for one in next(iter(function.blocks.values())).instructions:
            if one.op == "alloca":
                shown, declared = self.module.variable(function, one.result)
                depth = DEFAULT_DEPTH
                for pragma in about(self.pragmas, shown, declared):
                    if pragma.kind == "STREAM":
                        depth = max(1, number(pragma, "depth"))
                count = one.element.count if one.element.kind == "array" else 1
                inner = shown if path == name else f"{path}_{shown}"
                groups[one.result] = Group(self._unique(inner), depth, False, declared, array=count > 1)
                self.fifos.append(groups[one.result])
            elif one.op == "getelementptr":
                base = groups[one.args[0][1].name]
                groups[one.result] = self._shifted(base, one.element, [value for _, value in one.args[1:]], one)
            elif one.op == "call" and one.detail in self.module.functions:
                self._call(one, groups, scalars, path)
            elif not (one.op == "ret" or one.op == "call" and one.detail.startswith(IGNORED)):
                raise RtlError(
                    f"an expression (`{one.op}`) inside a DATAFLOW body, which holds streams and calls only: compute "
                    "it in a process",
                    self.module.place(one.debug),
                )

    def _shifted(self, base: Group, kind: Type, indices: list[Value], one: Instruction) -> Group:
        if not all(isinstance(index, Number) for index in indices):
            raise RtlError("a stream that is chosen at run time", self.module.place(one.debug))
        start = base.start
        for index, value in enumerate(indices):
            kind = kind.element if index else kind
            start += value.value * kind.size
        return Group(base.name, base.depth, base.is_port, base.place, start, base.streams, True)

    def _call(self, one: Instruction, groups: dict[str, Group], scalars: dict[str, Slice | int], path: str) -> None:
        function = self.module.functions[one.detail]
        inner: dict[str, Group] = {}
        words: dict[str, Slice | int] = {}
        for (name, kind), (_, value) in zip(function.arguments, one.args, strict=True):
            if kind.kind == "ptr":
                if isinstance(value, Address) and isinstance(value.base, Local):
                    numbers: list[Value] = [Number(index) for index in value.indices]
                    inner[name] = self._shifted(groups[value.base.name], value.element, numbers, one)
                elif isinstance(value, Local) and value.name in groups:
                    inner[name] = groups[value.name]
                else:
                    raise RtlError(
                        f"the argument `{name}` of a process is neither a stream nor a scalar",
                        self.module.place(one.debug),
                    )
            elif isinstance(value, Number):
                words[name] = value.value
            else:
                words[name] = scalars[value.name]
        short = self.module.short_name(function)
        self._function(function, inner, words, short, self._unique(short))

    def _unique(self, name: str) -> str:
        name = re.sub(r"\W", "_", name)
        count, unique = 1, name
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique

    def _process(
        self, function: Function, streams: dict[str, Group], scalars: dict[str, Slice | int], path: str
    ) -> None:
        if function.name not in self.processes:
            taken = {process.name for process in self.processes.values()}
            name, count = f"{self.module.short_name(function)}_process", 1
            while name in taken:
                count += 1
                name = f"{self.module.short_name(function)}_process_{count}"
            self.processes[function.name] = translate(self.module, function, self.pragmas, self.pipelined, name)
        process = self.processes[function.name]
        instance = Instance(path, process, scalars=[scalars[name] for name, _ in process.arguments])
        self.instances.append(instance)
        for port in process.ports:
            group = streams[port.argument]
            stream = self._stream(group, group.start + port.index)
            end = (instance, port.name)
            taken_by = stream.writer if port.is_output else stream.reader
            if taken_by is not None:
                word = "written" if port.is_output else "read"
                raise RtlError(
                    f"the stream `{stream.name}` is {word} by {taken_by[0].name} and by {path}", stream.place
                )
            if port.is_output:
                stream.writer = end
            else:
                stream.reader = end
            if stream.bits not in (0, port.bits):
                raise RtlError(
                    f"the stream `{stream.name}` has {stream.bits} bits at one end and {port.bits} at the other",
                    stream.place,
                )
            stream.bits = port.bits
            instance.streams[port.name] = stream

    def _stream(self, group: Group, index: int) -> Stream:
        if index not in group.streams:
            is_array = group.array or index > 0
            name = f"{group.name}_{index}" if is_array else group.name
            group.streams[index] = Stream(name, group.depth, group.is_port, group.place)
        return group.streams[index]

    def _check(self, stream: Stream) -> None:
        ends = [end for end in (stream.writer, stream.reader) if end is not None]
        if stream.is_port and len(ends) == 2:
            raise RtlError(f"the port `{stream.name}` is read and written", stream.place)
        if not stream.is_port and len(ends) < 2:
            missing = "written" if stream.writer is None else "read"
            raise RtlError(f"the stream `{stream.name}` is never {missing}", stream.place)
