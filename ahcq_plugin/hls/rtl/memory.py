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
from ahcq_plugin.hls.rtl.llvm_read import flattened, signed
from ahcq_plugin.hls.rtl.llvm_types import Address, Function, Global, Instruction, Local, Number, Type, Value
from ahcq_plugin.hls.rtl.loops import Pragma, about

SMALL = 4  # elements up to which an array becomes registers without a pragma, as in Vitis


@dataclass(frozen=True)
class Pointer:
    """An address: ``base`` (an alloca, a variable of the module, an argument), bytes, and (value, stride in bytes)."""

    base: str
    is_global: bool
    offset: int = 0
    terms: tuple[tuple[Value, int], ...] = ()


@dataclass(eq=False)
class Access:
    """A load or a store: where it is, what it addresses within its array, how many bytes."""

    one: Instruction
    block: str
    offset: int
    terms: tuple[tuple[Value, int], ...]
    columns: list[Column] = field(default_factory=list)

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


class Memories:
    """All arrays of a function; ``of`` gives the access that an instruction is."""

    def __init__(self, module: Module, function: Function, control: Control, pragmas: Iterable[Pragma]):
        self.module, self.function, self.pragmas = module, function, list(pragmas)
        self.definitions = {
            one.result: one for block in control.blocks.values() for one in block.instructions if one.result
        }
        self.arrays: dict[tuple[str, int], Array] = {}
        self.of: dict[Instruction, Access] = {}
        for name, block in control.blocks.items():
            for one in block.instructions:
                if one.op in ("load", "store"):
                    self._access(one, name)
        for array in self.arrays.values():
            self._divide(array)

    def pointer(self, value: Value, one: Instruction) -> Pointer:
        """What a pointer addresses; RtlError where it is chosen at run time."""
        if isinstance(value, Global):
            return Pointer(value.name, True)
        if isinstance(value, Address):
            base = self.pointer(value.base, one)
            offset = _steps(value.element, [(Type("int", 64), Number(index & (2**64 - 1))) for index in value.indices])[
                0
            ]
            return Pointer(base.base, base.is_global, base.offset + offset, base.terms)
        if not isinstance(value, Local):
            raise RtlError("a null or undefined pointer is used", self.module.place(one.debug))
        made = self.definitions.get(value.name)
        if made is None or made.op == "alloca":
            return Pointer(value.name, False)
        if made.op == "getelementptr":
            base = self.pointer(made.args[0][1], one)
            offset, terms = _steps(made.element, made.args[1:])
            return Pointer(base.base, base.is_global, base.offset + offset, base.terms + terms)
        if made.op in ("phi", "select", "freeze"):
            found = {self.pointer(arg, one) for _, arg in made.args[made.op == "select" :] if arg != value}
            if len(found) == 1:
                return found.pop()
        raise RtlError(
            "an address that is chosen at run time (a pointer variable, or ?: of two arrays): write the accesses out",
            self.module.place(one.debug),
        )

    def _access(self, one: Instruction, block: str) -> None:
        pointer = self.pointer(one.args[-1][1], one)
        array, offset = self._array(pointer, one)
        access = Access(one, block, offset, pointer.terms)
        array.accesses.append(access)
        self.of[one] = access

    def _array(self, pointer: Pointer, one: Instruction) -> tuple[Array, int]:
        """The array of a pointer, and the offset in it; members of structures are arrays of their own."""
        place = self.module.place(one.debug)
        if pointer.is_global:
            variable = self.module.variables.get(pointer.base)
            if variable is None or variable.value is None:
                raise RtlError(f"the variable {pointer.base} is not defined here, or holds addresses", place)
            kind, shown, declared = variable.type, pointer.base, place
        else:
            made = self.definitions.get(pointer.base)
            if made is None:
                raise RtlError(
                    f"the argument `{pointer.base}` is an array: pass its words through a stream and store them", place
                )
            variable, kind = None, made.element
            shown, declared = self.module.variable(self.function, pointer.base)
            declared = declared if declared.line else place
        start, offset = 0, pointer.offset
        while kind.kind == "struct" and kind.fields:
            index = max(i for i, at in enumerate(kind.offsets) if at <= max(offset, 0))
            start, offset, kind = start + kind.offsets[index], offset - kind.offsets[index], kind.fields[index]
        key = (pointer.base, start)
        if key not in self.arrays:
            self.arrays[key] = self._made(key, shown, declared, kind, variable)
        array = self.arrays[key]
        positive = pointer.terms and all(stride > 0 for _, stride in pointer.terms)
        if offset < 0 or (
            start and positive and offset >= array.size - 2 * array.size // 3 > 0 and offset >= array.size - 8
        ):
            raise RtlError(f"an index of `{shown}` that begins below 0 or at its end: shift the index", place)
        return array, offset

    def _made(self, key, shown: str, declared: Place, kind: Type, variable) -> Array:
        name = f"{_identifier(shown)}{f'_{key[1]}' if key[1] else ''}"
        taken = {array.name for array in self.arrays.values()}
        while name in taken:
            name += "_"
        values = {}
        if variable is not None:
            values = {at: (leaf.bits, bits) for at, leaf, bits in flattened(variable.type, variable.value)}
            values = {at - key[1]: value for at, value in values.items() if key[1] <= at < key[1] + kind.size}
        how = "rom" if variable is not None and variable.constant else "ram"
        distance = None
        for pragma in about(self.pragmas, shown, declared):
            if pragma.kind == "DEPENDENCE":
                distance = _promise(pragma)
            elif pragma.kind == "ARRAY_PARTITION" and how == "ram" and _is_complete(pragma):
                how = "registers"
        return Array(name, declared, kind.size, how, values, distance)

    def _divide(self, array: Array) -> None:
        strides = {abs(stride) for access in array.accesses for _, stride in access.terms}
        array.step = math.gcd(*strides) if strides else array.size
        edges = {0, array.step}
        for access in array.accesses:
            start = access.offset % array.step
            end = start + access.one.type.size
            if end > array.step:
                raise RtlError(f"an access across elements of `{array.name}`", self.module.place(access.one.debug))
            edges |= {start, end}
        cuts = sorted(edges)
        for start, end in zip(cuts, cuts[1:], strict=False):
            depth = max(1, -(-(array.size - start) // array.step))
            array.columns.append(Column(array, start, end - start, depth, 8 * (end - start)))
        for access in array.accesses:
            start = access.offset % array.step
            end = start + access.one.type.size
            access.columns = [column for column in array.columns if start <= column.start < end]
            for column in access.columns:
                column.accesses.append(access)
        array.columns = [column for column in array.columns if column.accesses]
        if array.kind == "ram" and max(column.depth for column in array.columns) <= SMALL:
            array.kind = "registers"
        for column in array.columns:
            self._narrow(column)

    def _narrow(self, column: Column) -> None:
        """Make the words of a column as wide as what is stored in it."""
        if column.array.kind == "rom" or column.array.values:
            return
        widths = []
        for access in column.accesses:
            if access.is_write:
                if len(access.columns) > 1:
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


def _steps(kind: Type, indices) -> tuple[int, tuple[tuple[Value, int], ...]]:
    """Bytes and terms of the indices of a getelementptr."""
    offset, terms = 0, []
    for position, (index_type, index) in enumerate(indices):
        if position and kind.kind == "struct":
            offset, kind = offset + kind.offsets[index.value], kind.fields[index.value]
            continue
        kind = kind.element if position else kind
        if isinstance(index, Number):
            offset += signed(index.value, index_type.bits) * kind.size
        else:
            terms.append((index, kind.size))
    return offset, tuple(terms)


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
