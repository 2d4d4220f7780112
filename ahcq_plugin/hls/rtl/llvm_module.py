# SPDX-License-Identifier: Apache-2.0
"""A module of LLVM IR: functions, variables, and where in the C++ they come from."""

from __future__ import annotations

import re
from functools import cached_property

from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.llvm_read import POINTER, VOID, Tokens, unquoted
from ahcq_plugin.hls.rtl.llvm_types import Block, Function, Instruction, Type, Variable

_FLAGS = (
    "nuw",
    "nsw",
    "exact",
    "disjoint",
    "nneg",
    "samesign",
    "inbounds",
    "nusw",
    "volatile",
    "tail",
    "musttail",
    "notail",
)
_FAST = ("fast", "nnan", "ninf", "nsz", "arcp", "contract", "afn", "reassoc")
_LINKAGE = re.compile(r"^@(\S+|\"[^\"]+\") = (?:[\w()]+ )*?(constant|global) (.*)$")


class _Types(dict):
    """Named types, read when they are asked for: one may name others that stand below it."""

    def __init__(self, lines: list[tuple[str, str]]):
        super().__init__()
        self._bodies = {unquoted(name): body for name, body in lines}

    def __missing__(self, name: str) -> Type:
        body = self._bodies[name]
        self[name] = Type("opaque") if body == "opaque" else Tokens(body, self).type()
        return self[name]


class Module:
    """What clang wrote for one translation unit."""

    def __init__(self, text: str):
        self.types = _Types(re.findall(r"^(%.*) = type (.*)$", text, re.MULTILINE))
        self.functions: dict[str, Function] = {}
        self.variables: dict[str, Variable] = {}
        self._metadata: dict[int, str] = {}
        lines = iter(text.splitlines())
        for line in lines:
            if line.startswith("define "):
                self._define(line, lines)
            elif line.startswith("!"):
                number, _, body = line[1:].partition(" = ")
                if number.isdigit():
                    self._metadata[int(number)] = body
            elif line.startswith("@") and (found := _LINKAGE.match(line)):
                self._variable(found)

    def _variable(self, found: re.Match) -> None:
        tokens = Tokens(found[3], self.types)
        kind = tokens.type()
        name = found[1].strip('"')
        try:
            value = tokens.value(kind)
        except RtlError:
            value = None  # holds addresses or other things; an error where a function of the design uses it
        self.variables[name] = Variable(name, found[2] == "constant", kind, value)

    def _define(self, line: str, lines) -> None:
        head = Tokens(line[: line.rindex("{")], self.types)
        while not head.peek().startswith("@"):
            head.next()
        name = unquoted(head.next())
        head.expect("(")
        arguments = []
        while not head.accept(")"):
            if head.accept("..."):
                continue
            kind = head.type()
            head.skip_attributes()
            arguments.append((unquoted(head.next()), kind))
            head.accept(",")
        function = Function(name, arguments, {}, {}, _number(line, "!dbg"))
        block = None
        for line in lines:
            if line == "}":
                break
            if not line.strip() or line.lstrip().startswith(";"):
                continue
            if not line.startswith(" "):
                label = line[: line.index(":")].strip('"')
                block = function.blocks.setdefault(label, Block(label))
            elif line.startswith("    #dbg_"):
                self._note(function, line)
            else:
                if line.endswith("["):  # switch: one case a line
                    for part in lines:
                        line += " " + part.strip()
                        if part.strip().startswith("]"):
                            break
                if block is None:
                    block = function.blocks.setdefault("0", Block("0"))
                block.instructions.append(self._instruction(line.strip()))
        self.functions[name] = function

    def _note(self, function: Function, line: str) -> None:
        """Remember the C++ variable of a value."""
        found = re.match(r"\s+#dbg_(?:declare|value)\(\S+ %(\"[^\"]+\"|[\w.$-]+), !(\d+),", line)
        if found:
            function.variables.setdefault(found[1].strip('"'), int(found[2]))
        # where optimisation moved the value: (value, variable, expression, number, address, expression, place)
        found = re.match(r"\s+#dbg_assign\(.*?, !(\d+), !DIExpression\(.*?\), !\d+, ptr %(\"[^\"]+\"|[\w.$-]+),", line)
        if found:
            function.variables.setdefault(found[2].strip('"'), int(found[1]))

    def _instruction(self, line: str) -> Instruction:
        debug, loop = _number(line, "!dbg"), _number(line, "!llvm.loop")
        tokens = Tokens(re.sub(r"(, ![\w.]+ !\w+)+$", "", re.sub(r" #\d+(?=$|, !)", "", line)), self.types)
        result = None
        if tokens.peek().startswith("%") and tokens.peek(1) == "=":
            result = unquoted(tokens.next())
            tokens.next()
        tokens.skip_words("tail", "musttail", "notail")
        op = tokens.next()
        disjoint = tokens.peek() == "disjoint"
        tokens.skip_words(*_FLAGS, *_FAST)
        one = Instruction(result, op, VOID, [], detail="disjoint" * disjoint, debug=debug, loop=loop)
        read = getattr(self, f"_read_{op}", None)
        if read is not None:
            read(tokens, one)
        elif op in _BINARY:
            one.type = tokens.type()
            one.args = [(one.type, tokens.value(one.type))]
            tokens.expect(",")
            one.args.append((one.type, tokens.value(one.type)))
        elif op in _CASTS:
            self._operand(tokens, one)
            tokens.expect("to")
            one.type = tokens.type()
        else:
            one.detail = line  # outside the subset; an error if the design runs it
            one.op = f"unknown {op}"
        return one

    def _operand(self, tokens: Tokens, one: Instruction) -> None:
        kind = tokens.type()
        tokens.skip_attributes()
        one.args.append((kind, tokens.value(kind)))

    def _read_phi(self, tokens: Tokens, one: Instruction) -> None:
        one.type = tokens.type()
        while tokens.accept("["):
            one.args.append((one.type, tokens.value(one.type)))
            tokens.expect(",")
            one.labels.append(unquoted(tokens.next()))
            tokens.expect("]")
            tokens.accept(",")

    def _read_icmp(self, tokens: Tokens, one: Instruction) -> None:
        one.detail = tokens.next()
        tokens.skip_words(*_FLAGS, *_FAST)
        kind = tokens.type()
        one.type = Type("int", 1)
        one.args = [(kind, tokens.value(kind))]
        tokens.expect(",")
        one.args.append((kind, tokens.value(kind)))

    _read_fcmp = _read_icmp

    def _read_select(self, tokens: Tokens, one: Instruction) -> None:
        for _ in range(3):
            self._operand(tokens, one)
            tokens.accept(",")
        one.type = one.args[1][0]

    def _read_fneg(self, tokens: Tokens, one: Instruction) -> None:
        self._operand(tokens, one)
        one.type = one.args[0][0]

    _read_freeze = _read_fneg

    def _read_load(self, tokens: Tokens, one: Instruction) -> None:
        one.type = tokens.type()
        tokens.expect(",")
        self._operand(tokens, one)

    def _read_store(self, tokens: Tokens, one: Instruction) -> None:
        self._operand(tokens, one)
        tokens.expect(",")
        self._operand(tokens, one)
        one.type = one.args[0][0]

    def _read_getelementptr(self, tokens: Tokens, one: Instruction) -> None:
        one.type, one.element = POINTER, tokens.type()
        while tokens.accept(","):
            self._operand(tokens, one)

    def _read_alloca(self, tokens: Tokens, one: Instruction) -> None:
        one.type, one.element = POINTER, tokens.type()

    def _read_br(self, tokens: Tokens, one: Instruction) -> None:
        if tokens.accept("label"):
            one.labels = [unquoted(tokens.next())]
            return
        self._operand(tokens, one)
        while tokens.accept(","):
            tokens.expect("label")
            one.labels.append(unquoted(tokens.next()))

    def _read_switch(self, tokens: Tokens, one: Instruction) -> None:
        self._operand(tokens, one)
        tokens.expect(",")
        tokens.expect("label")
        one.labels = [unquoted(tokens.next())]
        tokens.expect("[")
        while not tokens.accept("]"):
            self._operand(tokens, one)
            tokens.expect(",")
            tokens.expect("label")
            one.labels.append(unquoted(tokens.next()))

    def _read_ret(self, tokens: Tokens, one: Instruction) -> None:
        if not tokens.accept("void"):
            self._operand(tokens, one)

    def _read_unreachable(self, tokens: Tokens, one: Instruction) -> None:
        pass

    def _read_call(self, tokens: Tokens, one: Instruction) -> None:
        while re.fullmatch(r"noundef|signext|zeroext|noalias|nonnull|range|fastcc|inreg", tokens.peek()):
            tokens.next()
            if tokens.peek() == "(":
                tokens.skip_parentheses()
        one.type = tokens.type()
        if tokens.peek() == "(":  # the type of a function with variable arguments
            tokens.skip_parentheses()
        callee = tokens.next()
        if not callee.startswith("@"):
            one.op = f"unknown call of {callee}"
            return
        one.detail = unquoted(callee)
        if one.detail.startswith(IGNORED):
            return
        tokens.expect("(")
        while not tokens.accept(")"):
            self._operand(tokens, one)
            tokens.accept(",")

    def place(self, debug: int) -> Place:
        """The C++ line of a debug location: the innermost call that does not stand in our headers for clang."""
        found = Place("?", 0)
        while debug >= 0:
            body = self._metadata.get(debug, "")
            line, scope = _number(body, "line:", ""), _number(body, "scope:")
            found = Place(self._file(scope) if scope >= 0 else "?", max(line, 0))
            debug = _number(body, "inlinedAt:") if found.file.endswith(OUR_HEADERS) else -1
        return found

    def short_name(self, function: Function) -> str:
        """A function's C++ name without namespaces and template arguments."""
        found = re.search(r'name: "([^"<]*)', self._metadata.get(function.debug, ""))
        return found[1] if found else function.name

    def function_place(self, function: Function) -> Place:
        """Where a function is defined."""
        body = self._metadata.get(function.debug, "")
        return Place(self._file(function.debug), max(_number(body, "line:", ""), 0))

    def variable(self, function: Function, name: str) -> tuple[str, Place]:
        """C++ name and place of the declaration of an alloca or a value; its own name if there is none."""
        body = self._metadata.get(function.variables.get(name, -1), "")
        if not body:
            return re.sub(r"(\.i|\d+|\.\d+)+$", "", name) or name, Place("?", 0)
        file = _number(body, "file:")
        return re.search(r'name: "([^"]*)"', body)[1], Place(self._file_name(file), max(_number(body, "line:", ""), 0))

    def loop_place(self, number: int) -> Place | None:
        """Where a loop begins, from the metadata of its branch."""
        for part in re.findall(r"!(\d+)", self._metadata.get(number, "")):
            if self._metadata.get(int(part), "").startswith("!DILocation"):
                return self.place(int(part))
        return None

    def _file(self, scope: int) -> str:
        body = self._metadata.get(scope, "")
        file = _number(body, "file:")
        return self._file_name(file) if file >= 0 else "?"

    def _file_name(self, number: int) -> str:
        found = re.search(r'filename: "([^"]*)", directory: "([^"]*)"', self._metadata.get(number, ""))
        if not found:
            return "?"
        return found[1] if found[1].startswith("/") else f"{found[2]}/{found[1]}"

    @cached_property
    def defined(self) -> frozenset[str]:
        """Names of the functions with a body."""
        return frozenset(self.functions)


#: Headers whose lines say nothing about a design.
OUR_HEADERS = ("clang/include/ap_int.h", "clang/include/hls_stream.h")
_BINARY = (
    *("add", "sub", "mul", "udiv", "sdiv", "urem", "srem", "shl", "lshr", "ashr", "and", "or", "xor"),
    *("fadd", "fsub", "fmul", "fdiv", "frem"),
)
_CASTS = (
    "zext",
    "sext",
    "trunc",
    "bitcast",
    "sitofp",
    "uitofp",
    "fptosi",
    "fptoui",
    "ptrtoint",
    "inttoptr",
    "fpext",
    "fptrunc",
)
#: Intrinsics that say something to an optimiser and do nothing.
IGNORED = ("llvm.lifetime.", "llvm.assume", "llvm.experimental.noalias", "llvm.dbg.", "llvm.donothing")


def _number(text: str, key: str, mark: str = "!") -> int:
    found = re.search(rf"{re.escape(key)} {mark}(\d+)", text)
    return int(found[1]) if found else -1
