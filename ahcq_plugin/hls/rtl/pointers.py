# SPDX-License-Identifier: Apache-2.0
"""What addresses point to, and copies of memory written out as loads and stores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ahcq_plugin.hls.rtl.errors import RtlError
from ahcq_plugin.hls.rtl.factors import trailing_zeros
from ahcq_plugin.hls.rtl.llvm_module import Module
from ahcq_plugin.hls.rtl.llvm_read import POINTER, VOID, signed
from ahcq_plugin.hls.rtl.llvm_types import Address, Block, Function, Global, Instruction, Local, Number, Type, Value

ADDRESS_BITS = 32
#: Of a value and its width: a constant, and (value, factor) whose sum is the value, modulo the size of memory.
Linear = Callable[[Value, int], tuple[int, list[tuple[Value, int]]]]


@dataclass(frozen=True)
class Pointer:
    """An address within ``base`` (an alloca, a variable of the module, an argument).

    Attributes:
        fixed: bytes before the first variable index, which choose a member or an element of outer dimensions.
        rest: constant bytes after it.
        terms: variable parts: (value, bytes that it is multiplied by).
        reach: bytes of the largest array that a variable index is an index of; None where a pointer itself was moved.
    """

    base: str
    is_global: bool
    fixed: int = 0
    rest: int = 0
    terms: tuple[tuple[Value, int], ...] = ()
    reach: int | None = 0

    def moved(self, kind: Type, indices: list[tuple[Type, Value]], linear: Linear) -> Pointer:
        """The address after a ``getelementptr``; ``linear`` takes its indices apart."""
        fixed, rest, terms, reach = self.fixed, self.rest, list(self.terms), self.reach
        for position, (index_type, index) in enumerate(indices):
            if position and kind.kind == "struct":
                step, kind = kind.offsets[index.value], kind.fields[index.value]
            else:
                whole, kind = kind, kind.element if position else kind
                if not isinstance(index, Number):
                    reach = None if reach is None or not position else max(reach, whole.size)
                    constant, parts = linear(index, index_type.bits)
                    terms += [(value, factor * kind.size) for value, factor in parts]
                    rest += constant * kind.size
                    continue
                step = signed(index.value, index_type.bits) * kind.size
            fixed, rest = (fixed, rest + step) if terms else (fixed + step, rest)
        return replace(self, fixed=fixed, rest=rest, terms=tuple(terms), reach=reach)

    def stays_within(self, size: int) -> bool:
        """Whether the variable parts choose none of several elements of ``size`` bytes: by their strides or arrays."""
        return self.reach is not None and self.reach <= size or all(abs(stride) < size for _, stride in self.terms)


class Pointers:
    """Resolves the addresses of a function."""

    def __init__(self, module: Module, blocks: dict[str, Block]):
        self.module = module
        self.definitions = {one.result: one for block in blocks.values() for one in block.instructions if one.result}
        self._home = {one.result: block for block in blocks.values() for one in block.instructions if one.result}
        self._zeros = trailing_zeros(blocks.values())

    def pointer(self, value: Value, one: Instruction) -> Pointer:
        """What ``value`` points to; RtlError where it is chosen at run time (``one`` uses it)."""
        if isinstance(value, Global):
            return Pointer(value.name, True)
        if isinstance(value, Address):
            index_type = Type("int", 64)
            indices: list[tuple[Type, Value]] = [(index_type, Number(index & (2**64 - 1))) for index in value.indices]
            return self.pointer(value.base, one).moved(value.element, indices, self.linear)
        if not isinstance(value, Local):
            raise RtlError("a null or undefined pointer is used", self.module.place(one.debug))
        made = self.definitions.get(value.name)
        if made is None or made.op == "alloca":
            return Pointer(value.name, False)
        if made.op == "getelementptr":
            return self.pointer(made.args[0][1], one).moved(made.element, made.args[1:], self.linear)
        if made.op in ("phi", "select", "freeze"):
            found = {self.pointer(arg, one) for _, arg in made.args[made.op == "select" :] if arg != value}
            if len(found) == 1:
                return found.pop()
        raise RtlError(
            "an address that is chosen at run time (a pointer variable, or ?: of two arrays): write the accesses out",
            self.module.place(one.debug),
        )

    def linear(self, value: Value, bits: int) -> tuple[int, list[tuple[Value, int]]]:
        """A sum that is equal to an index, see ``Linear``. Sums of fewer than ADDRESS_BITS wrap: no parts."""
        if isinstance(value, Number):
            return signed(value.value, bits), []
        made = self.definitions.get(getattr(value, "name", ""))
        if made is None or bits != ADDRESS_BITS:
            return 0, [(value, 1)]
        if made.op not in ("add", "sub", "mul", "shl", "or"):
            return 0, [self._divided(made)]
        (_, left), (_, right) = made.args
        if made.op in ("add", "sub") or made.op == "or" and made.detail == "disjoint":
            constant, terms = self.linear(left, bits)
            other, more = self.linear(right, bits)
            sign = -1 if made.op == "sub" else 1
            return constant + sign * other, [*terms, *((term, sign * factor) for term, factor in more)]
        if made.op in ("mul", "shl") and isinstance(right, Number):
            factor = signed(right.value, bits) if made.op == "mul" else 1 << right.value
            constant, terms = self.linear(left, bits)
            return constant * factor, [(term, factor * inner) for term, inner in terms]
        return 0, [self._divided(made)]

    def _divided(self, made: Instruction) -> tuple[Value, int]:
        """(value, factor) of an instruction's result, the factor a power of two that divides it."""
        zeros = self._zeros.get(made.result, 0)
        if not 0 < zeros < ADDRESS_BITS:
            return Local(made.result), 1
        name = f"{made.result}.over.{1 << zeros}"
        if name not in self.definitions:
            by = (made.type, Number(zeros))
            self.definitions[name] = Instruction(name, "ashr", made.type, [(made.type, Local(made.result)), by])
            block = self._home[made.result]
            after = len(block.phis) if made.op == "phi" else block.instructions.index(made) + 1
            block.instructions.insert(after, self.definitions[name])
        return Local(name), 1 << zeros

    def type_of(self, pointer: Pointer, one: Instruction) -> Type:
        """The type of what ``pointer`` is in."""
        if pointer.is_global:
            variable = self.module.variables.get(pointer.base)
            if variable is None or variable.value is None:
                raise RtlError(
                    f"`{pointer.base}` is not defined here, or holds addresses", self.module.place(one.debug)
                )
            return variable.type
        made = self.definitions.get(pointer.base)
        if made is None:
            raise RtlError(
                f"the argument `{pointer.base}` is an array: pass its words through a stream and store them",
                self.module.place(one.debug),
            )
        return made.element


def write_out_copies(module: Module, function: Function) -> None:
    """Replace memcpy, memmove and memset of constant lengths by loads and stores of words."""
    pointers = Pointers(module, function.blocks)
    count = 0
    for block in function.blocks.values():
        made: list[Instruction] = []
        for one in list(block.instructions):
            if one.op == "call" and one.detail.startswith(("llvm.memcpy", "llvm.memmove", "llvm.memset")):
                count += 1
                made += _written_out(pointers, one, f"copy.{count}")
            else:
                made.append(one)
        block.instructions = made


def _written_out(pointers: Pointers, one: Instruction, name: str) -> list[Instruction]:
    place = pointers.module.place(one.debug)
    length, is_set = one.args[2][1], one.detail.startswith("llvm.memset")
    if not isinstance(length, Number) or is_set and one.args[1][1] != Number(0):
        raise RtlError("memcpy of a variable length, or memset to something else than 0", place)
    target = pointers.pointer(one.args[0][1], one)
    words = _words(pointers.type_of(target, one), target.fixed + target.rest, length.value)
    if not is_set:
        source = pointers.pointer(one.args[1][1], one)
        others = _words(pointers.type_of(source, one), source.fixed + source.rest, length.value)
        # where the types differ, the smaller words: those of the other fall into whole ones
        words = words if len(words) >= len(others) else others
    loads, stores = [], []
    for index, (at, kind) in enumerate(words):
        value: Value = Number(0)
        if not is_set:
            loads.append(_offset(one.args[1][1], at, f"{name}.from.{index}", one))
            loads.append(
                Instruction(f"{name}.{index}", "load", kind, [(POINTER, Local(loads[-1].result))], debug=one.debug)
            )
            value = Local(f"{name}.{index}")
        stores.append(_offset(one.args[0][1], at, f"{name}.to.{index}", one))
        stores.append(
            Instruction(None, "store", kind, [(kind, value), (POINTER, Local(stores[-1].result))], debug=one.debug)
        )
    return [*loads, *stores]


def _offset(base: Value, at: int, name: str, one: Instruction) -> Instruction:
    byte = Type("int", 8)
    index = (Type("int", 32), Number(at))
    return Instruction(name, "getelementptr", POINTER, [(POINTER, base), index], element=byte, debug=one.debug)


def _words(kind: Type, start: int, length: int) -> list[tuple[int, Type]]:
    """(offset from ``start``, type) of the scalars in ``length`` bytes of an object; of an element like any other."""
    while kind.kind == "array" and kind.element.size >= length:
        kind = kind.element
        start %= max(kind.size, 1)
    found: list[tuple[int, Type]] = []
    _collect(kind, -start, length, found)
    return found


def _collect(kind: Type, at: int, length: int, found: list[tuple[int, Type]]) -> None:
    if at >= length or at + kind.size <= 0:
        return
    if kind.is_scalar:
        found.append((at, kind))
    elif kind.kind == "array":
        first = max(0, -at // max(1, kind.element.size))
        for index in range(first, kind.count):
            if at + index * kind.element.size >= length:
                return
            _collect(kind.element, at + index * kind.element.size, length, found)
    elif kind.kind == "struct":
        for offset, part in zip(kind.offsets, kind.fields, strict=True):
            _collect(part, at + offset, length, found)
    else:
        assert kind != VOID


def write_out_choices(module: Module, function: Function) -> None:
    """Make addresses within one array, of which one is chosen at run time, one address with a variable index."""
    pointers = Pointers(module, function.blocks)
    for block in function.blocks.values():
        made: list[Instruction] = []
        addresses: list[Instruction] = []
        for one in block.instructions:
            if one.op != "phi":
                made, addresses = made + addresses, []
            choice = _choice(pointers, one) if one.op in ("phi", "select") and one.type == POINTER else None
            if choice is None:
                made.append(one)
                continue
            base, low, step, index = choice
            start = _offset(base, low, f"{one.result}.start", one)
            chosen: list[tuple[Type, Value]] = [(POINTER, Local(start.result)), (index.type, Local(index.result))]
            element = Type("array", count=step, element=Type("int", 8))
            address = Instruction(one.result, "getelementptr", POINTER, chosen, element=element, debug=one.debug)
            made.append(index)
            addresses += [start, address]
        block.instructions = made + addresses
        pointers.definitions |= {one.result: one for one in block.instructions if one.result}


def _choice(pointers: Pointers, one: Instruction) -> tuple[Value, int, int, Instruction] | None:
    """(array, lowest offset, step, instruction that chooses the index); None unless all are constant in an array."""
    values = one.args[one.op == "select" :]
    try:
        found = [pointers.pointer(value, one) for _, value in values]
    except RtlError:
        return None
    offsets = [pointer.fixed + pointer.rest for pointer in found]
    known = found[0].is_global or getattr(pointers.definitions.get(found[0].base), "op", "") == "alloca"
    if not known or len({pointer.base for pointer in found}) > 1 or any(pointer.terms for pointer in found):
        return None
    step, low = math.gcd(*(offset - min(offsets) for offset in offsets)), min(offsets)
    if step == 0:
        return None
    kind = Type("int", 32)
    numbers: list[tuple[Type, Value]] = [(kind, Number((offset - low) // step)) for offset in offsets]
    args = [one.args[0], *numbers] if one.op == "select" else numbers
    base: Value = Global(found[0].base) if found[0].is_global else Local(found[0].base)
    index = Instruction(f"{one.result}.index", one.op, kind, args, list(one.labels), debug=one.debug)
    return base, low, step, index
