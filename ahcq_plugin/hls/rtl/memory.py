# SPDX-License-Identifier: Apache-2.0
"""The arrays of a function: what every access addresses, and into which columns each array falls.

All accesses of an array together decide. If the variable parts of all addresses are multiples of S bytes, then bytes
that differ modulo S never meet: every such column is a memory of its own (ARRAY_PARTITION by use).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ahcq_plugin.hls.rtl.control import Control
from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.llvm_module import Module
from ahcq_plugin.hls.rtl.llvm_read import flattened
from ahcq_plugin.hls.rtl.llvm_types import Function, Instruction, Number, Type, Value
from ahcq_plugin.hls.rtl.loops import Pragma, about
from ahcq_plugin.hls.rtl.pointers import Pointer, Pointers

SMALL = 4  # words up to which an array becomes registers without a pragma, as in Vitis
SMALL_CONSTANT = 64  # the same of an array with constant indices, which Vitis partitions for its throughput


@dataclass(eq=False)
class Access:
    """A load or a store: what it addresses within its array.

    ``pieces`` divide it by columns: (column, elements beyond the variable part, lowest bit within the value).
    """

    one: Instruction
    array: Array
    offset: int
    terms: tuple[tuple[Value, int], ...]
    pieces: list[tuple[Column, int, int]] = field(default_factory=list)

    @property
    def columns(self) -> list[Column]:
        """Columns that it uses, some of them perhaps twice."""
        return [column for column, _, _ in self.pieces]

    @property
    def is_write(self) -> bool:
        """Whether it stores."""
        return self.one.op == "store"


@dataclass(eq=False)
class Column:
    """A memory: the bytes [start, start + size) of every ``step`` bytes of an array; ``depth`` words of ``bits``.

    ``sign``: whether a loaded word is extended to all its bytes by its sign.
    """

    array: Array
    start: int
    size: int
    depth: int
    bits: int
    sign: bool = False
    accesses: list[Access] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Unique within the process."""
        return f"{self.array.name}_{self.start}" if len(self.array.columns) > 1 else self.array.name


@dataclass(eq=False)
class Array:
    """An array, or a member of a structure, of the C++.

    Attributes:
        kind: "rom", "registers" or "ram".
        values: bits of the constant at each byte offset; of registers their values after a reset.
        distance: turns for which two accesses are promised to differ (DEPENDENCE), None for no promise, 0 for ever.
    """

    name: str
    place: Place
    size: int
    kind: str
    values: dict[int, tuple[int, int]]
    distance: int | None = None
    accesses: list[Access] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class _Use:
    """A load or a store, its pointer, and the fixed bytes that no member or outer dimension has taken yet."""

    one: Instruction
    pointer: Pointer
    fixed: int


class Memories(Pointers):
    """All arrays of a function; ``of`` gives the access that an instruction is."""

    def __init__(self, module: Module, function: Function, control: Control, pragmas: Iterable[Pragma]):
        super().__init__(module, control.blocks)
        self.function, self.pragmas = function, list(pragmas)
        self.arrays: list[Array] = []
        self.of: dict[Instruction, Access] = {}
        uses: dict[tuple[str, bool], list[_Use]] = {}
        for block in control.blocks.values():
            for one in list(block.instructions):
                if one.op in ("load", "store"):
                    pointer = self.pointer(one.args[-1][1], one)
                    use = _Use(one, pointer, pointer.fixed)
                    uses.setdefault((pointer.base, pointer.is_global), []).append(use)
        for found in uses.values():
            kind = self.type_of(found[0].pointer, found[0].one)
            self._part(kind, found, 0)
        for array in self.arrays:
            self._divide(array)

    def is_same_word(self, first: Instruction, second: Instruction) -> bool:
        """Whether both read one word of a memory: that is one access."""
        a, b = self.of.get(first), self.of.get(second)
        if a is None or b is None or a.is_write or b.is_write or a.terms != b.terms:
            return False
        words = {column: word for column, word, _ in a.pieces}
        return all(words.get(column, word) == word for column, word, _ in b.pieces)

    def _part(self, kind: Type, uses: list[_Use], start: int) -> None:
        """Make arrays of the members and outer elements that the fixed bytes of the uses choose, from ``start`` on."""
        parts = []
        if kind.kind == "struct" and kind.fields:
            parts = list(zip(kind.offsets, kind.fields, strict=True))
        elif kind.kind == "array" and kind.element.kind in ("array", "struct") and kind.element.size:
            parts = [(index * kind.element.size, kind.element) for index in range(kind.count)]
        chosen: dict[int, list[_Use]] = {}
        for use in uses if parts else ():
            index = max((i for i, (at, _) in enumerate(parts) if at <= use.fixed), default=0)
            at, part = parts[index]
            end = use.fixed - at + (0 if use.pointer.terms else use.one.type.size)
            if (
                use.fixed < 0
                or end > part.size
                or not use.pointer.stays_within(part.size)  # also of a struct: clang makes arrays that end in zeros one
                or index
                and use.pointer.terms
                and self._at_end(use, use.fixed - at, part)
            ):
                chosen.clear()
                break
            chosen.setdefault(index, []).append(_Use(use.one, use.pointer, use.fixed - at))
        if not chosen:
            self._array(kind, uses, start)
        for index in sorted(chosen):
            self._part(parts[index][1], chosen[index], start + parts[index][0])

    def _at_end(self, use: _Use, offset: int, part: Type) -> bool:
        """Whether variable indices seem to begin at the end of a part: perhaps before the next one's begin."""
        depth = part.size // min(abs(stride) for _, stride in use.pointer.terms)
        return (
            depth > 2
            and all(stride > 0 for _, stride in use.pointer.terms)
            and offset >= part.size - part.size // depth
        )

    def _array(self, kind: Type, uses: list[_Use], start: int) -> None:
        pointer, place = uses[0].pointer, self.module.place(uses[0].one.debug)
        if pointer.is_global:
            variable, shown, declared = self.module.variables[pointer.base], pointer.base, place
        else:
            variable = None
            shown, declared = self.module.variable(self.function, pointer.base)
            declared = declared if declared.line else place
        name = f"{_identifier(shown)}_{start}" if start else _identifier(shown)
        taken = {array.name for array in self.arrays}
        while name in taken:
            name += "_"
        values = {}
        if variable is not None:
            values = {at: (leaf.bits, bits) for at, leaf, bits in flattened(variable.type, variable.value)}
            values = {at - start: value for at, value in values.items() if start <= at < start + kind.size}
        how, distance = "rom" if variable is not None and variable.constant else "ram", None
        for pragma in about(self.pragmas, shown, declared):
            if pragma.kind == "DEPENDENCE":
                distance = _promise(pragma)
            elif pragma.kind == "ARRAY_PARTITION" and how == "ram" and _is_complete(pragma):
                how = "registers"
        array = Array(name, declared, kind.size, how, values, distance)
        self.arrays.append(array)
        for use in uses:
            access = Access(use.one, array, use.fixed + use.pointer.rest, use.pointer.terms)
            if access.offset < 0 and not access.terms:
                raise RtlError(f"an index of `{shown}` that begins below 0: shift it", self.module.place(use.one.debug))
            array.accesses.append(access)
            self.of[use.one] = access

    def _divide(self, array: Array) -> None:
        strides = {abs(stride) for access in array.accesses for _, stride in access.terms}
        array.step = step = math.gcd(*strides) if strides else array.size
        edges = {0, step}
        for access in array.accesses:
            edges |= {access.offset % step, (access.offset + access.one.type.size) % step}
        cuts = sorted(edges)
        for start, end in zip(cuts, cuts[1:], strict=False):
            depth = max(1, -(-(array.size - start) // step))
            array.columns.append(Column(array, start, end - start, depth, 8 * (end - start)))
        starts = {column.start: column for column in array.columns}
        for access in array.accesses:
            at, end = access.offset, access.offset + access.one.type.size
            while at < end:
                column = starts[at % step]
                access.pieces.append((column, at // step, 8 * (at - access.offset)))
                column.accesses.append(access)
                at += column.size
        array.columns = [column for column in array.columns if column.accesses]
        if array.kind == "ram" and self._is_small(array):
            array.kind = "registers"
        for column in array.columns:
            self._narrow(column)

    def _is_small(self, array: Array) -> bool:
        """Whether an array without a pragma becomes registers: few words, or not many and addressed by constants."""
        depth = max(column.depth for column in array.columns)
        constant = any(not access.terms or len(set(access.columns)) < len(access.pieces) for access in array.accesses)
        return depth <= SMALL or constant and depth <= SMALL_CONSTANT

    def _narrow(self, column: Column) -> None:
        """Make the words of a column as wide as what is stored in it."""
        if column.array.kind == "rom" or column.array.values:
            return
        widths = []
        for access in column.accesses:
            if access.is_write:
                if len(access.pieces) > 1:
                    return
                widths.append(self._stored(access.one))
        if widths:
            column.sign = any(sign for _, sign in widths)
            column.bits = min(column.bits, max(bits + (column.sign and not sign) for bits, sign in widths))

    def _stored(self, one: Instruction) -> tuple[int, bool]:
        """(bits, whether signed) that surely hold the number that is stored."""
        kind, value = one.args[0]
        if isinstance(value, Number):
            return max(1, value.value.bit_length()), False
        made = self.definitions.get(getattr(value, "name", None))
        if made is not None and made.op in ("zext", "sext"):
            return made.args[0][0].bits, made.op == "sext"
        if made is not None and made.op == "and" and isinstance(made.args[1][1], Number):
            return max(1, made.args[1][1].value.bit_length()), False
        if made is not None and made.op == "ashr" and isinstance(made.args[1][1], Number):
            return max(1, kind.bits - made.args[1][1].value), True
        return kind.bits, False


def _is_complete(pragma: Pragma) -> bool:
    complete = "complete" in pragma.options or pragma.options.get("type") == "complete"
    return complete and pragma.options.get("dim", "0") == "0"


def _promise(pragma: Pragma) -> int | None:
    """Turns that a DEPENDENCE pragma promises: 0 for never, None if it promises nothing about turns."""
    if "intra" in pragma.options or pragma.options.get("type") == "intra":
        return None
    if "false" in pragma.options or pragma.options.get("dependent") == "false":
        return 0
    try:
        return int(pragma.options.get("distance", ""))
    except ValueError:
        return None


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)
