# SPDX-License-Identifier: Apache-2.0
"""Clang's syntax tree with the place of every node, and the functions of a program's own files in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.rtl.clang import Program
from ahcq_plugin.hls.rtl.errors import Place
from ahcq_plugin.hls.rtl.loops import Pragma, Source

Tree = dict[str, Any]
LOOPS = ("ForStmt", "WhileStmt", "DoStmt")


@dataclass(frozen=True, eq=False)
class Written:
    """A function with a body, as it is instantiated.

    Attributes:
        source: its file.
        body: its outermost block.
        parameters: identities of its parameters, in order.
        lines: first and last.
    """

    name: str
    source: Source
    body: Tree
    parameters: tuple[str, ...]
    lines: tuple[int, int]

    @cached_property
    def pragmas(self) -> list[Pragma]:
        """Those inside it."""
        first, last = self.lines
        return [one for one in self.source.pragmas if first <= one.place.line <= last]

    def has(self, kind: str) -> bool:
        """Whether a pragma of this kind stands right in its body."""
        return any(one.kind == kind and one.scope[1] == self.lines[1] for one in self.pragmas)

    def loop_has(self, loop: Tree, kind: str) -> bool:
        """Whether a loop has a pragma of this kind."""
        starts = [one for one in self.source.loops if self.source.line(one.start) == loop["line"]]
        return any(pragma.kind == kind for one in starts for pragma in one.pragmas)


class Syntax:
    """The functions of a program; ``functions`` by the identity that calls of them have."""

    def __init__(self, program: Program):
        tree = program.syntax_tree()
        _place(tree, _Here())
        sources = {str(path.resolve()): source for path, source in program.files.items()}
        self.functions: dict[str, Written] = {}
        self.variables: dict[str, Tree] = {}
        for node in _instances(tree):
            body = next((part for part in node.get("inner", ()) if part.get("kind") == "CompoundStmt"), None)
            source = sources.get(str(Path(node.get("file") or "?").resolve()))
            if body is None or source is None or "line" not in body:
                continue
            parameters = tuple(part["id"] for part in node["inner"] if part.get("kind") == "ParmVarDecl")
            self.functions[node["id"]] = Written(node["name"], source, body, parameters, (body["line"], body["last"]))
            self.variables |= {
                part["id"]: part for part in walk(node) if part.get("kind") in ("VarDecl", "ParmVarDecl")
            }


def place(function: Written, node: Tree) -> Place:
    """Where a node of a function stands."""
    return Place(function.source.name, node.get("line", function.lines[0]))


def walk(node: Tree) -> Iterator[Tree]:
    """The node and all below it."""
    stack = [node]
    while stack:
        now = stack.pop()
        yield now
        stack += [part for part in reversed(now.get("inner", ())) if part]


def bare(node: Tree) -> Tree:
    """The node without casts, parentheses and labels around it."""
    while node.get("kind") in _AROUND and node.get("inner"):
        node = node["inner"][-1 if node["kind"] == "LabelStmt" else 0]
    return node


def statements(block: Tree) -> list[Tree]:
    """What a block holds, labels off."""
    parts = block.get("inner", ()) if block.get("kind") == "CompoundStmt" else (block,)
    return [bare(part) for part in parts if part and part.get("kind") != "NullStmt"]


def loop_body(loop: Tree) -> Tree:
    """The body of a loop."""
    return loop["inner"][0 if loop["kind"] == "DoStmt" else -1]


def referred(node: Tree) -> str | None:
    """Identity of the variable or function that an expression is."""
    node = bare(node)
    return node["referencedDecl"]["id"] if node.get("kind") == "DeclRefExpr" else None


def root(node: Tree) -> tuple[str | None, list[str], list[Tree]]:
    """Of an access: identity of its variable, members from the outside in, indices from the outside in."""
    members, indices = [], []
    while True:
        node = bare(node)
        kind = node.get("kind")
        if kind == "ArraySubscriptExpr":
            indices.append(node["inner"][1])
        elif kind == "MemberExpr":
            members.append(node["name"])
        else:
            return referred(node), members[::-1], indices[::-1]
        node = node["inner"][0]


def uses(node: Tree, identities: set[str]) -> bool:
    """Whether one of the variables occurs."""
    return any((part.get("referencedDecl") or {}).get("id") in identities for part in walk(node))


_AROUND = (
    *("ImplicitCastExpr", "ParenExpr", "LabelStmt", "ExprWithCleanups", "CXXStaticCastExpr", "CStyleCastExpr"),
    *("MaterializeTemporaryExpr", "CXXBindTemporaryExpr", "CXXFunctionalCastExpr", "ConstantExpr", "AttributedStmt"),
)


def _instances(node: Tree, inside_template: bool = False) -> Iterator[Tree]:
    """Functions that are no templates themselves: the first one below a template is the template's own."""
    own = True
    for part in node.get("inner", ()):
        kind = part.get("kind")
        if kind in ("FunctionDecl", "CXXMethodDecl"):
            if not (node.get("kind") == "FunctionTemplateDecl" and own) and not inside_template:
                yield part
            own = False
        elif kind in ("ClassTemplateDecl", "ClassTemplatePartialSpecializationDecl"):
            for inner in part.get("inner", ()):
                if inner.get("kind") == "ClassTemplateSpecializationDecl":
                    yield from _instances(inner)
        elif kind in _HOLDERS:
            yield from _instances(part, inside_template)


_HOLDERS = (
    *("NamespaceDecl", "FunctionTemplateDecl", "CXXRecordDecl", "ClassTemplateSpecializationDecl", "LinkageSpecDecl"),
    "TranslationUnitDecl",
)


class _Here:
    file, line = "", 0


def _place(node: Any, here: _Here) -> None:
    """Give every node its file and line: the text says them only where they change."""
    if isinstance(node, list):
        for part in node:
            _place(part, here)
        return
    if "offset" in node or "spellingLoc" in node:
        for part in (node.get("spellingLoc"), node.get("expansionLoc"), node):
            if isinstance(part, dict) and "offset" in part:
                here.file, here.line = part.get("file", here.file), part.get("line", here.line)
                part["file"], part["line"] = here.file, here.line
        return
    begin = None
    for key, value in list(node.items()):
        if not isinstance(value, dict | list) or key in ("referencedDecl", "type", "includedFrom"):
            continue
        _place(value, here)
        if key == "range":
            begin, end = (_expanded(value.get(side, {})) for side in ("begin", "end"))
            node["file"], node["line"] = begin.get("file"), begin.get("line", 0)
            node["last"] = end.get("line", node["line"])
    if begin is None and "loc" in node:
        node["line"] = node["loc"].get("line", 0)


def _expanded(where: Tree) -> Tree:
    return where.get("expansionLoc", where)
