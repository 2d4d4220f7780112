# SPDX-License-Identifier: Apache-2.0
"""A reader of LLVM IR's text: the grammar of the LLVM language reference, as far as clang -O2 uses it for HLS C++."""

from __future__ import annotations

import re
import struct

from ahcq_plugin.hls.rtl.errors import RtlError
from ahcq_plugin.hls.rtl.llvm_types import Address, Global, Local, Number, Pieces, Type, Value

_TOKEN = re.compile(
    r'\s*(?:(?P<string>c?"[^"]*")|(?P<name>[%@$](?:[\w.$-]+|"[^"]*"))|(?P<meta>![\w.]*)|(?P<number>-?\d[\w.+-]*)'
    r"|(?P<word>[A-Za-z_][\w.]*)|(?P<group>#\w+)|(?P<mark>\.\.\.|[^\s]))"
)
VOID, POINTER, FLOAT = Type("void"), Type("ptr"), Type("float", 32)
_SIMPLE = {"void": VOID, "ptr": POINTER, "float": FLOAT, "label": Type("label"), "metadata": Type("metadata")}
_ZERO = ("zeroinitializer", "undef", "poison", "null", "none", "false")


class Tokens:
    """The tokens of one line or definition, read from left to right; ``types`` are the named structures."""

    def __init__(self, text: str, types: dict[str, Type]):
        self.text, self.types = text, types
        self.items = [found.group(found.lastgroup) for found in _TOKEN.finditer(text)]
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        """The next token, "" at the end."""
        return self.items[self.at + ahead] if self.at + ahead < len(self.items) else ""

    def next(self) -> str:
        """Take the next token."""
        self.at += 1
        return self.items[self.at - 1] if self.at <= len(self.items) else ""

    def accept(self, *wanted: str) -> bool:
        """Take the next token if it is one of ``wanted``."""
        found = self.peek() in wanted
        self.at += found
        return found

    def expect(self, wanted: str) -> None:
        """Take ``wanted``; RtlError if another token comes."""
        if not self.accept(wanted):
            raise RtlError(
                f"LLVM IR that this reader does not know: expected {wanted!r} at {self.peek()!r} in {self.text!r}"
            )

    def skip_words(self, *words: str) -> None:
        """Take flags and attributes as long as they are among ``words``."""
        while self.peek() in words:
            self.next()

    def skip_attributes(self) -> None:
        """Take the attributes of an argument or a result, those with parentheses too (``align 8``, ``range(...)``)."""
        while re.fullmatch(r"[a-z_]\w*", self.peek()) and self.peek() not in (*_ZERO, "true", "getelementptr"):
            word = self.next()
            if self.peek() == "(":
                self.skip_parentheses()
            elif word in ("align", "dereferenceable"):
                self.next()

    def skip_parentheses(self) -> None:
        """Take a group in parentheses."""
        depth = 0
        while True:
            token = self.next()
            depth += (token == "(") - (token == ")")
            if depth == 0 or not token:
                return

    def type(self) -> Type:
        """Take a type."""
        token = self.next()
        if token == "[":
            count = int(self.next())
            self.expect("x")
            element = self.type()
            self.expect("]")
            return Type("array", count=count, element=element)
        if token == "<" and self.peek() == "{":
            self.next()
            found = self._fields(packed=True)
            self.expect(">")
            return found
        if token == "{":
            return self._fields(packed=False)
        if token == "<":  # a vector
            while self.next() not in (">", ""):
                pass
            return Type("vector")
        if token.startswith("%"):
            return self.types[unquoted(token)]
        if re.fullmatch(r"i\d+", token):
            return Type("int", int(token[1:]))
        if token in _SIMPLE:
            return _SIMPLE[token]
        return Type(token or "nothing")

    def _fields(self, packed: bool) -> Type:
        fields = []
        while not self.accept("}"):
            fields.append(self.type())
            self.accept(",")
        return Type("struct", fields=tuple(fields), packed=packed)

    def value(self, kind: Type) -> Value:
        """Take a value of type ``kind``."""
        token = self.next()
        if token.startswith("%"):
            return Local(unquoted(token))
        if token.startswith("@"):
            return Global(unquoted(token))
        if token == "getelementptr":
            return self._constant_address()
        if token in _ZERO:
            return Number(0)
        if token == "true":
            return Number(1)
        if token.startswith('c"'):
            return _pieces_of_text(token[2:-1])
        if token in ("[", "{", "<"):
            return self._pieces(kind, {"[": "]", "{": "}", "<": "}"}[token], packed=token == "<")
        if kind.kind == "float":
            return Number(_float_bits(token))
        if re.fullmatch(r"-?\d+", token):
            return Number(int(token) & ((1 << max(kind.bits, 1)) - 1) if kind.kind == "int" else int(token))
        raise RtlError(f"a constant that this reader does not know: {token!r} in {self.text!r}")

    def _constant_address(self) -> Address:
        self.skip_words("inbounds", "nuw", "nusw")
        while self.accept("inrange"):
            self.skip_parentheses()
        self.expect("(")
        element = self.type()
        self.expect(",")
        base = self.value(self.type())
        if isinstance(base, Number | Pieces):
            raise RtlError(f"a constant address without a variable: {self.text!r}")
        indices = []
        while self.accept(","):
            kind = self.type()
            index = self.value(kind)
            if not isinstance(index, Number):
                raise RtlError(f"an index that is no number in a constant address: {self.text!r}")
            indices.append(signed(index.value, kind.bits))
        self.expect(")")
        return Address(element, base, tuple(indices))

    def _pieces(self, kind: Type, end: str, packed: bool) -> Pieces:
        if packed:
            self.expect("{")
        scalars, index = [], 0
        while not self.accept(end):
            part = self.type()
            offset = index * part.size if kind.kind == "array" else kind.offsets[index]
            scalars += [(offset + at, leaf, bits) for at, leaf, bits in flattened(part, self.value(part))]
            index += 1
            self.accept(",")
        if packed:
            self.expect(">")
        return Pieces(tuple(scalars))


def flattened(kind: Type, value: Value) -> list[tuple[int, Type, int]]:
    """(byte offset, type, bits) of the scalars of a constant; zeros for one that only says zero."""
    if isinstance(value, Pieces):
        return list(value.scalars)
    if kind.is_scalar and isinstance(value, Number):
        return [(0, kind, value.value)]
    if kind.kind in ("array", "struct") and value == Number(0):
        parts = (
            [(index * kind.element.size, kind.element) for index in range(kind.count)]
            if kind.kind == "array"
            else list(zip(kind.offsets, kind.fields, strict=True))
        )
        return [(at + inner, leaf, bits) for at, part in parts for inner, leaf, bits in flattened(part, Number(0))]
    raise RtlError(f"a constant of type {kind.kind} that holds an address; the hardware has none")


def unquoted(name: str) -> str:
    """``%"a b"`` to ``a b``, ``@f`` to ``f``."""
    return name[1:].strip('"')


def signed(value: int, bits: int) -> int:
    """A number of two's complement from its bits."""
    return value - (1 << bits) if bits and value >> (bits - 1) else value


def _float_bits(token: str) -> int:
    if token.startswith("0x"):  # the bits of a double, also for a float
        number = struct.unpack("<d", int(token[2:], 16).to_bytes(8, "little"))[0]
    else:
        number = float(token)
    return int.from_bytes(struct.pack("<f", number), "little")


def _pieces_of_text(text: str) -> Pieces:
    data = re.sub(r"\\([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)
    return Pieces(tuple((at, Type("int", 8), ord(char)) for at, char in enumerate(data)))
