# SPDX-License-Identifier: Apache-2.0
"""Types and values of LLVM IR, as far as the subset of HLS C++ needs them. Sizes are those of x86-64."""

from __future__ import annotations

from dataclasses import dataclass, field

POINTER_BYTES = 8


@dataclass(frozen=True)
class Type:
    """A first-class type, or what an array or a structure is made of.

    Attributes:
        kind: "int", "float", "ptr", "array", "struct", "void", or the name of a type that is outside the subset.
        bits: of an integer or a float.
        count, element: of an array.
        fields, packed: of a structure.
    """

    kind: str
    bits: int = 0
    count: int = 0
    element: Type | None = None
    fields: tuple[Type, ...] = ()
    packed: bool = False

    @property
    def alignment(self) -> int:
        """In bytes."""
        if self.kind == "array":
            return self.element.alignment
        if self.kind == "struct":
            return 1 if self.packed else max((part.alignment for part in self.fields), default=1)
        if self.kind == "ptr":
            return POINTER_BYTES
        size = 1
        while size * 8 < self.bits and size < 16:
            size *= 2
        return size

    @property
    def size(self) -> int:
        """Bytes from one element of an array of this type to the next."""
        if self.kind == "array":
            return self.count * self.element.size
        if self.kind == "struct":
            return _rounded(self.offsets[-1] + self.fields[-1].size, self.alignment) if self.fields else 0
        if self.kind == "ptr":
            return POINTER_BYTES
        return _rounded(-(-self.bits // 8), self.alignment)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of every field of a structure."""
        offsets, at = [], 0
        for part in self.fields:
            at = at if self.packed else _rounded(at, part.alignment)
            offsets.append(at)
            at += part.size
        return tuple(offsets)

    @property
    def is_scalar(self) -> bool:
        """Whether a value of this type is a word of ``bits`` bits in the hardware."""
        return self.kind in ("int", "float")


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Local:
    """An instruction's result or an argument."""

    name: str


@dataclass(frozen=True)
class Global:
    """A function or a variable of the module."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant integer, or the bits of a constant float; 0 for undefined values, zeroinitializer and null."""

    value: int


@dataclass(frozen=True)
class Pieces:
    """A constant array or structure: its scalars in order, and where each of them lies (byte offset, type, bits)."""

    scalars: tuple[tuple[int, Type, int], ...]


@dataclass(frozen=True)
class Address:
    """A constant address: ``getelementptr`` of ``base`` with constant indices."""

    element: Type
    base: Local | Global | Address
    indices: tuple[int, ...]


Value = Local | Global | Number | Pieces | Address


@dataclass(eq=False)
class Instruction:
    """One instruction.

    Attributes:
        result: its name, None for one without.
        op: its opcode.
        type: of the result; of a store, of the stored value.
        args: operands with their types, without labels.
        labels: targets of a branch (``br``: true, false), incoming blocks of a phi.
        detail: predicate of a comparison, name of the called function, "disjoint" of an or that is a sum, or "".
        element: source type of a getelementptr, allocated type of an alloca.
        debug: number of its debug location, -1 without.
        loop: number of the loop metadata of a branch, -1 without.
    """

    result: str | None
    op: str
    type: Type
    args: list[tuple[Type, Value]]
    labels: list[str] = field(default_factory=list)
    detail: str = ""
    element: Type | None = None
    debug: int = -1
    loop: int = -1


@dataclass(eq=False)
class Block:
    """Instructions that run one after the other; the last one leaves the block."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def phis(self) -> list[Instruction]:
        """The phis, which come first."""
        return [one for one in self.instructions if one.op == "phi"]

    @property
    def last(self) -> Instruction:
        """The instruction that leaves the block."""
        return self.instructions[-1]


@dataclass(eq=False)
class Function:
    """A function with a body: ``arguments`` as (name, type), blocks in order, the first is the entry.

    ``variables`` names the C++ variable (number of its metadata) of allocas and values.
    """

    name: str
    arguments: list[tuple[str, Type]]
    blocks: dict[str, Block]
    variables: dict[str, int]
    debug: int


@dataclass(eq=False)
class Variable:
    """A variable of the module: constant or not, its type, its initial value."""

    name: str
    constant: bool
    type: Type
    value: Value
