# SPDX-License-Identifier: Apache-2.0
"""C++ with HLS pragmas made ready for clang: loops get clang's unroll pragmas, calls of DATAFLOW bodies stay calls.

The text is read as tokens with matched brackets, so that every pragma finds the block that it stands in; lines keep
their numbers.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from ahcq_plugin.hls.rtl.errors import Place, RtlError

_PRAGMA = re.compile(r"#[ \t]*pragma[ \t]+HLS[ \t]+(\w+)[ \t]*((?:\\\n|[^\n])*)", re.IGNORECASE)
_BLANKED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:\\\n|[^\n])*', re.DOTALL | re.MULTILINE
)
FULL, KEEP = "clang loop unroll(full)", "clang loop unroll(disable)"


@dataclass(frozen=True)
class Pragma:
    """An HLS pragma: its kind in capitals, its options (a word without a value has the value ""), where it stands.

    ``scope`` is the span of lines of the innermost block around it.
    """

    kind: str
    options: dict[str, str]
    place: Place
    scope: tuple[int, int]


@dataclass(eq=False)
class Loop:
    """A loop statement: offsets of its keyword and of its body (without braces), its pragmas, the loops in it."""

    start: int
    body: tuple[int, int]
    pragmas: list[Pragma] = field(default_factory=list)


def blanked(text: str) -> str:
    """``text`` with spaces for comments, strings and preprocessor lines; offsets and lines stay."""
    return _BLANKED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


class Source:
    """One C++ file.

    Attributes:
        pragmas: in the order of the text.
        loops: in the order of the text.
    """

    def __init__(self, text: str, name: str):
        self.text, self.name, self.code = text, name, blanked(text)
        self._lines = [0, *(found.end() for found in re.finditer("\n", text))]
        self._partner = self._brackets()
        self.loops = [loop for found in re.finditer(r"\b(for|while|do)\b", self.code) if (loop := self._loop(found))]
        self.pragmas: list[Pragma] = []
        self._dataflow: list[tuple[int, int]] = []
        self._pipelined: list[tuple[int, int]] = []
        for found in _PRAGMA.finditer(text):
            if self.code[found.start()] == " ":
                self._add(found)

    def line(self, offset: int) -> int:
        """Line number of an offset, from 1."""
        return bisect(self._lines, offset)

    def _brackets(self) -> dict[int, int]:
        stack, partner = [], {}
        for found in re.finditer(r"[(){}\[\]]", self.code):
            if found[0] in "({[":
                stack.append(found.start())
            elif stack:
                partner[stack[-1]] = found.start()
                stack.pop()
        return partner

    def _skip(self, at: int) -> int:
        while at < len(self.code) and self.code[at].isspace():
            at += 1
        return at

    def _loop(self, found: re.Match) -> Loop | None:
        at = self._skip(found.end())
        if found[1] == "do":
            return Loop(found.start(), self._statement(at)) if self.code[at : at + 1] == "{" else None
        if self.code[at : at + 1] != "(" or at not in self._partner:
            return None
        after = self._skip(self._partner[at] + 1)
        if self.code[after : after + 1] == ";":  # the end of a do
            return None
        return Loop(found.start(), self._statement(after))

    def _statement(self, at: int) -> tuple[int, int]:
        """Span of the statement at ``at``; of a block what its braces hold."""
        if self.code[at] == "{":
            return at + 1, self._partner.get(at, len(self.code))
        start = at
        while at < len(self.code) and self.code[at] != ";":
            if self.code[at] == "{":  # of a nested loop or an if: ends the statement
                at = self._partner[at]
                rest = self.code[self._skip(at + 1) :]
                if not re.match(r"else\b", rest):
                    break
            elif self.code[at] in "([":
                at = self._partner[at]
            at += 1
        return start, at

    def _block(self, offset: int) -> tuple[int, int]:
        """The innermost braces around an offset."""
        around = [(a, b) for a, b in self._partner.items() if self.code[a] == "{" and a < offset < b]
        return max(around, default=(0, len(self.code)))

    def _add(self, found: re.Match) -> None:
        block = self._block(found.start())
        text = re.sub(r"//.*|/\*.*?\*/", "", found[2])
        words = re.findall(r"(\w+)\s*(?:=\s*((?:[^\s=]+(?:\s*[*+:/-]+\s*[^\s=]+)*)))?", text)
        options = {name.lower(): value.strip() for name, value in words}
        place = Place(self.name, self.line(found.start()))
        pragma = Pragma(found[1].upper(), options, place, (self.line(block[0]), self.line(block[1])))
        self.pragmas.append(pragma)
        loop = next((one for one in self.loops if one.body[0] == block[0] + 1), None)
        if loop is not None:
            loop.pragmas.append(pragma)
        if pragma.kind == "PIPELINE" and "off" not in options:
            self._pipelined.append(block)
        elif pragma.kind == "DATAFLOW":
            self._dataflow.append(block)

    def pipelined_loops(self) -> list[int]:
        """Lines at which loops with a PIPELINE pragma begin."""
        return [self.line(loop.start) for loop in self.loops if any(one.kind == "PIPELINE" for one in loop.pragmas)]

    def prepared(self) -> str:
        """The text for clang; RtlError for an UNROLL whose factor is no number."""
        inserts: list[tuple[int, str]] = []
        for loop in self.loops:
            inside = any(a < loop.start < b for a, b in self._pipelined) or any(
                a < loop.start < b for a, b in self._dataflow
            )
            how = FULL if inside else KEEP
            for pragma in loop.pragmas:
                if pragma.kind == "UNROLL":
                    how = FULL
                    if (factor := pragma.options.get("factor")) is not None and not inside:
                        how = f"clang loop unroll_count({factor})"
            inserts.append((loop.start, f'_Pragma("{how}") '))
        for a, b in self._dataflow:
            inserts += [(at, "[[clang::noinline]] ") for at in self._calls(a + 1, b)]
        text = self.text
        for at, words in sorted(inserts, reverse=True):
            text = text[:at] + words + text[at:]
        return text

    def _calls(self, start: int, end: int) -> list[int]:
        """Offsets of statements of a DATAFLOW body that are calls: a name, template arguments, parentheses, the end."""
        found, at = [], start
        while at < end:
            at = self._skip(at)
            call = re.compile(r"(?!for\b|while\b|if\b|return\b|switch\b)(?:[\w]+\s*::\s*)*\w+\s*").match(
                self.code, at, end
            )
            after = call.end() if call else at
            if call and self.code[after : after + 1] == "<":
                after = self._angle(after)
            after = self._skip(after)
            if call and self.code[after : after + 1] == "(" and self.code[self._skip(self._partner[after] + 1)] == ";":
                found.append(at)
            at = self._next_statement(at, end)
        return found

    def _angle(self, at: int) -> int:
        depth = 0
        while True:
            depth += (self.code[at] == "<") - (self.code[at] == ">")
            at += 1
            if depth == 0:
                return at

    def _next_statement(self, at: int, end: int) -> int:
        while at < end and self.code[at] not in ";{}":
            at = self._partner[at] if self.code[at] in "([" else at
            at += 1
        return at + 1


def number(pragma: Pragma, option: str) -> int:
    """The value of an option that is a number; RtlError otherwise."""
    try:
        return int(pragma.options[option])
    except (KeyError, ValueError):
        raise RtlError(
            f"#pragma HLS {pragma.kind} needs a number for `{option}`, got {pragma.options}", pragma.place
        ) from None


def about(pragmas: Iterable[Pragma], variable: str, declared: Place) -> list[Pragma]:
    """The pragmas about a variable (or its members): those in whose block it is declared; else those of its file.

    A DEPENDENCE stands in a loop, below the declaration.
    """
    found = [one for one in pragmas if re.split(r"[.\[]", one.options.get("variable", ""))[0] == variable]
    found = [one for one in found if one.place.file == declared.file or not declared.line]
    inside = [one for one in found if one.scope[0] <= declared.line <= one.scope[1]]
    return [one for one in found if one in inside or one.kind == "DEPENDENCE"] if inside else found
