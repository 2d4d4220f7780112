# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of a process: constants, registers and RAMs."""

from __future__ import annotations

from typing import Any

from ahcq_plugin.hls.rtl.channels import Ram
from ahcq_plugin.hls.rtl.errors import RtlError
from ahcq_plugin.hls.rtl.llvm_types import Instruction, Type
from ahcq_plugin.hls.rtl.memory import Access, Column, Memories
from ahcq_plugin.hls.rtl.nodes import Node, needs


class Storage:
    """The accesses of a translation (``translation`` of process.py), in the order in which a turn makes them.

    Attributes:
        initial: state -> its value after a reset, as XLS IR writes it.
    """

    def __init__(self, translation: Any, memories: Memories):
        self.owner, self.memories, self.graph = translation, memories, translation.graph
        self.initial: dict[str, str] = {}
        self._writes: dict[Column, list[tuple[str, Node, Node, Node]]] = {}  # block, condition, index, data
        self._reads: dict[Column, list[tuple[Node, Node, Node, list]]] = {}
        self._chains: dict[tuple, Node] = {}

    def access(self, one: Instruction, block: str) -> None:
        """Make the nodes of a load or a store."""
        access = self.memories.of[one]
        if access.is_write:
            if access.array.kind == "rom":
                raise RtlError("a constant is written", self.owner.place(one))
            data = self.owner.value(*one.args[0], block)
            for column, word, bit in access.pieces:
                part = data
                if len(access.pieces) > 1:
                    part = self.graph.slice(data, bit, min(8 * column.size, data.bits - bit))
                part = self.graph.extend(part, column.bits)
                write = (block, self.owner.active[block], self._index(access, column, word, block), part)
                self._writes.setdefault(column, []).append(write)
            return
        parts = []
        for column, word, _ in access.pieces:
            found = self._read(column, block, self._index(access, column, word, block))
            parts.append(self.graph.extend(found, 8 * column.size, column.sign))
        whole = self.graph.concat(parts[::-1])
        self.owner.values[one.result] = self.graph.extend(whole, one.type.bits)

    def _index(self, access: Access, column: Column, word: int, block: str) -> Node:
        """The index of an access in a column, as wide as the column's depth needs; ``word`` is its constant part."""
        graph, bits = self.graph, max(1, (column.depth - 1).bit_length())
        index = graph.literal(bits, word)
        for value, stride in access.terms:
            kind = Type("int", self.owner.names.width(value.name))
            term = graph.extend(self.owner.value(kind, value, block), bits, sign=True)
            factor = stride // column.array.step
            if factor != 1:
                term = graph.node("umul", bits, [term, graph.literal(bits, factor)])
            index = term if index is graph.literal(bits, 0) else graph.node("add", bits, [index, term])
        return index

    def _earlier(self, column: Column, block: str) -> list[tuple[str, Node, Node, Node]]:
        """Writes that may have come before in the same turn."""
        return [one for one in self._writes.get(column, []) if one[0] == block or one[0] in self.owner.may[block]]

    def _read(self, column: Column, block: str, index: Node) -> Node:
        if column.array.kind == "rom":
            return self._constant(column, index)
        if column.array.kind == "registers":
            now = self._chain(column, tuple(self._earlier(column, block)))
            return now if column.depth == 1 else self.graph.node("array_index", column.bits, [now, index])
        stands = self.graph.node("identity", column.bits)
        earlier = [write[1:] for write in self._earlier(column, block)]
        self._reads.setdefault(column, []).append((self.owner.active[block], index, stands, earlier))
        return stands

    def _constant(self, column: Column, index: Node) -> Node:
        values = []
        for word in range(column.depth):
            at = column.start + word * column.array.step
            values.append(_bytes_of(column.array.values, at, column.size))
        if column.depth == 1 or index.op == "literal":
            at = 0 if column.depth == 1 else min(int(index.keys[0][6:]), column.depth - 1)
            return self.graph.literal(column.bits, values[at])
        kind = f"bits[{column.bits}][{column.depth}]"
        rom = self._chains.setdefault(
            (column,), self.graph.node("literal", kind, [], f"value=[{', '.join(map(str, values))}]")
        )
        return self.graph.node("array_index", column.bits, [rom, index])

    def _state(self, column: Column) -> str:
        name = f"mem_{column.name}"
        if name not in self.owner.states:
            state = self.owner.state(name, column.bits)
            values = [
                _bytes_of(column.array.values, column.start + i * column.array.step, column.size)
                for i in range(column.depth)
            ]
            self.initial[name] = str(values[0])
            if column.depth > 1:
                state.read.kind = f"bits[{column.bits}][{column.depth}]"
                self.initial[name] = f"[{', '.join(map(str, values))}]"
        return name

    def _chain(self, column: Column, writes: tuple) -> Node:
        """Registers after some writes."""
        state = self.owner.states[self._state(column)].read
        if not writes:
            return state
        key = (column, *writes)
        if key not in self._chains:
            before = self._chain(column, writes[:-1])
            _, condition, index, data = writes[-1]
            now = data if column.depth == 1 else self.graph.node("array_update", before.kind, [before, data, index])
            self._chains[key] = self.graph.select(condition, now, before)
        return self._chains[key]

    def finish(self) -> list[Ram]:
        """Give registers their next values, and RAMs their channels."""
        rams: list[Column] = []
        for array in self.memories.arrays:
            for column in array.columns:
                if array.kind == "registers" and f"mem_{column.name}" in self.owner.states:
                    state = self.owner.states[f"mem_{column.name}"]
                    state.next = self._chain(column, tuple(self._writes.get(column, ())))
                elif array.kind == "ram" and column in self._reads:
                    rams.append(column)
        for column in rams:
            if any(bits for _, bits in column.array.values.values()):
                raise RtlError(
                    f"the RAM `{column.array.name}` has initial values; write them at run time", column.array.place
                )
        forwarded = self._circles(rams)
        turn: list[tuple[str, Node, Node]] = []
        made = []
        for columns in self._together(rams, forwarded):
            reads = [
                (one[0], one[1], [(self._reads[column][at][2], self._reads[column][at][3]) for column in columns])
                for at, one in enumerate(self._reads[columns[0]])
            ]
            writes = [
                (one[1], one[2], self.graph.concat([self._writes[column][at][3] for column in columns[::-1]]))
                for at, one in enumerate(self._writes.get(columns[0], []))
            ]
            made.append(self.owner.channels.ram(columns, reads, writes, columns[0] in forwarded, turn))
        for name, read, following in turn:
            state = self.owner.state(name, read.bits)
            state.read, state.next = read, following
        return made

    def _together(self, rams: list[Column], forwarded: set[Column]) -> list[list[Column]]:
        """Columns of an array that are always read and written at the same time and address: one wide memory."""
        groups: dict[tuple, list[Column]] = {}
        for column in rams:
            reads = tuple(part for read in self._reads[column] for part in read[:2])
            writes = tuple(part for write in self._writes.get(column, ()) for part in write[1:3])
            groups.setdefault((column.array, column.depth, column in forwarded, reads, writes), []).append(column)
        return list(groups.values())

    def _circles(self, rams: list[Column]) -> set[Column]:
        """Columns whose written words need, through whatever columns, what is read of them in the same turn."""
        direct = {
            a: {
                b
                for b in rams
                if any(
                    needs(part, read[2])
                    for read in self._reads[b]
                    for write in self._writes.get(a, ())
                    for part in write[1:]
                )
            }
            for a in rams
        }
        changed = True
        while changed:
            changed = False
            for a in rams:
                more = set().union(direct[a], *(direct[b] for b in direct[a]))
                changed, direct[a] = changed or more != direct[a], more
        return {a for a in rams if a in direct[a]}


def _bytes_of(values: dict[int, tuple[int, int]], start: int, size: int) -> int:
    """The bits of ``size`` bytes of a constant at byte ``start``; bytes that it does not name are 0."""
    if start in values and -(-values[start][0] // 8) >= size:
        return values[start][1] & ((1 << (8 * size)) - 1)
    word = 0
    for at, (bits, value) in values.items():
        length = -(-bits // 8)
        if at < start + size and start < at + length:
            word |= (value << 8 * (at - start)) if at >= start else value >> 8 * (start - at)
    return word & ((1 << (8 * size)) - 1)
