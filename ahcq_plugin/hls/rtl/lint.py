# SPDX-License-Identifier: Apache-2.0
"""What HLS gets wrong silently: C simulation is right, the hardware hangs, is slow, or is not what was meant.

Rules: ``deadlock``, ``nest``, ``recurrence``, ``partition``, ``dependence``, ``dataflow`` (docs/hls_rtl.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ahcq_plugin.hls.rtl.clang import Program
from ahcq_plugin.hls.rtl.errors import Place
from ahcq_plugin.hls.rtl.syntax import (
    LOOPS,
    Syntax,
    Tree,
    Written,
    bare,
    loop_body,
    place,
    referred,
    root,
    statements,
    uses,
    walk,
)


class Finding(NamedTuple):
    """A fault: the rule that found it, where, what is wrong and what to do."""

    rule: str
    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.message}"


def lint(program: Program) -> list[Finding]:
    """All faults in the functions that the main file instantiates, each once, in the order of the files.

    Raises:
        RtlError: clang refuses the program.
    """
    syntax = Syntax(program)
    found: set[Finding] = set()
    for function in syntax.functions.values():
        found |= set(_deadlocks(function))
        found |= set(_dataflow(function))
        found |= set(_nests(function))
        for loop in _pipelined(function):
            found |= set(_dependences(syntax, function, loop))
            found |= set(_recurrences(syntax, function, loop))
    for name in list(syntax.functions):
        found |= set(_partitions(syntax, name))
    return sorted(found, key=lambda one: (one.place, one.rule, one.message))


def _pipelined(function: Written) -> list[Tree]:
    return [one for one in walk(function.body) if one.get("kind") in LOOPS and function.loop_has(one, "PIPELINE")]


def _is_stream(node: Tree) -> bool:
    kind = node.get("type", {})
    return "hls::stream<" in kind.get("desugaredQualType", kind.get("qualType", "")) or "stream<" in kind.get(
        "qualType", ""
    )


def _deadlocks(function: Written) -> Iterator[Finding]:
    """A stream of a function without DATAFLOW that goes to a call and is used elsewhere too: its ends run in turn."""
    if function.has("DATAFLOW"):
        return
    local = {one["id"]: one for one in walk(function.body) if one.get("kind") == "VarDecl" and _is_stream(one)}
    for identity, variable in local.items():
        using = [
            part for part in statements(function.body) if part.get("kind") != "DeclStmt" and uses(part, {identity})
        ]
        passed = [part for part in using if _passes(part, identity)]
        if passed and len(using) > 1:
            yield Finding(
                "deadlock",
                place(function, variable),
                f"the stream `{variable['name']}` is filled before what reads it starts, without DATAFLOW: hardware "
                "stops when it is full. Put both ends into functions, and DATAFLOW into this one",
            )


def _passes(statement: Tree, identity: str) -> bool:
    """Whether a call gets a stream as an argument."""
    calls = [part for part in walk(statement) if part.get("kind") == "CallExpr"]
    return any(referred(argument) == identity for call in calls for argument in call["inner"][1:])


def _dataflow(function: Written) -> Iterator[Finding]:
    """Something else than streams and calls of processes in a DATAFLOW body."""
    if not function.has("DATAFLOW"):
        return
    for part in _flat(function, function.body):
        kind = part.get("kind")
        if kind == "DeclStmt":
            bad = [one for one in part["inner"] if one.get("kind") == "VarDecl" and not _is_plain(one)]
        elif kind == "CallExpr":
            bad = [argument for argument in part["inner"][1:] if not _is_name(argument)]
        else:
            bad = [part]
        for one in bad:
            yield Finding(
                "dataflow",
                place(function, one),
                "an expression or a branch inside DATAFLOW: only streams and calls may stand there, compute it in a "
                "process",
            )


def _flat(function: Written, block: Tree) -> Iterator[Tree]:
    for part in statements(block):
        if part.get("kind") == "ForStmt" and function.loop_has(part, "UNROLL"):
            yield from _flat(function, loop_body(part))
        else:
            yield part


def _is_plain(variable: Tree) -> bool:
    """A stream, or a variable without an initial value that is computed."""
    inits = [bare(one) for one in variable.get("inner", ()) if "Attr" not in one.get("kind", "")]
    return _is_stream(variable) or all(
        one.get("kind") in ("CXXConstructExpr", "InitListExpr", "IntegerLiteral") for one in inits
    )


def _is_name(argument: Tree) -> bool:
    node = bare(argument)
    if node.get("kind") == "ArraySubscriptExpr":
        return _is_name(node["inner"][0])
    kinds = ("DeclRefExpr", "IntegerLiteral", "CXXBoolLiteralExpr", "FloatingLiteral", "MemberExpr")
    return node.get("kind") in (*kinds, "SubstNonTypeTemplateParmExpr")


def _nests(function: Written) -> Iterator[Finding]:
    """Statements beside a loop in the body of another, above a loop with PIPELINE: Vitis does not flatten the nest."""
    for outer in walk(function.body):
        if outer.get("kind") not in LOOPS or function.loop_has(outer, "PIPELINE") or function.loop_has(outer, "UNROLL"):
            continue
        parts = statements(loop_body(outer))
        inner = [part for part in parts if part.get("kind") in LOOPS]
        pipelined = [part for part in inner if any(loop in list(walk(part)) for loop in _pipelined(function))]
        others = [part for part in parts if part not in inner]
        if pipelined and others:
            yield Finding(
                "nest",
                place(function, others[0]),
                f"a statement beside the loop of line {pipelined[0]['line']}: the nest does not flatten, every turn of "
                "the outer loop waits for the pipeline to run empty. Move it into the inner loop, with a condition",
            )


def _loop_variables(loops: list[Tree]) -> set[str]:
    return {one["id"] for loop in loops for one in walk(loop["inner"][0] or {}) if one.get("kind") == "VarDecl"}


def _inner_loops(loop: Tree, node: Tree) -> list[Tree]:
    """Loops inside ``loop`` that are around ``node``."""
    return [
        one
        for one in walk(loop)
        if one.get("kind") in LOOPS and one is not loop and any(part is node for part in walk(one))
    ]


def _changes(node: Tree) -> tuple[Tree, Tree] | None:
    """(target, value) if a node assigns; both sides of a compound assignment are its target."""
    if (
        node.get("kind") == "CompoundAssignOperator"
        or node.get("kind") == "BinaryOperator"
        and node.get("opcode") == "="
    ):
        return node["inner"][0], node["inner"][1]
    if node.get("kind") == "CXXOperatorCallExpr" and len(node.get("inner", ())) == 3:
        name = (bare(node["inner"][0]).get("referencedDecl") or {}).get("name", "")
        if name in ("operator=", "operator+=", "operator-="):
            return node["inner"][1], node["inner"][2]
    return None


def _is_sum(node: Tree) -> bool:
    """Whether a node adds to its target."""
    changed = _changes(node)
    if changed is None:
        return False
    name = (bare(node["inner"][0]).get("referencedDecl") or {}).get("name", "") + node.get("opcode", "")
    if name.startswith(("operator+=", "operator-=")) or name.endswith(("+=", "-=")):
        return True
    identity = root(changed[0])[0]
    adds = [
        one for one in walk(changed[1]) if one.get("opcode") in ("+", "-") or "operator" in one.get("kind", "").lower()
    ]
    return identity is not None and bool(adds) and uses(changed[1], {identity})


def _sums(
    syntax: Syntax, function: Written, within: Tree, depth: int = 0
) -> Iterator[tuple[Tree, str, list[Tree], bool]]:
    """Additions to variables: (node, identity, indices, whether several follow each other there)."""
    for node in walk(within):
        if _is_sum(node):
            identity, _, indices = root(node["inner"][1 if node["kind"] == "CXXOperatorCallExpr" else 0])
            if identity is not None:
                yield node, identity, indices, False
        callee = syntax.functions.get(referred(node["inner"][0]) or "") if node.get("kind") == "CallExpr" else None
        if callee is None or depth > 6:
            continue
        for inner, identity, indices, several in _sums(syntax, callee, callee.body, depth + 1):
            if identity in callee.parameters:
                argument = node["inner"][1 + callee.parameters.index(identity)]
                given, _, outside = root(argument)
                several = several or _is_serial(callee.body, inner, indices)
                if given is not None:
                    yield node, given, [*outside, *indices], several


def _is_serial(around: Tree, node: Tree, indices: list[Tree]) -> bool:
    """Whether a loop repeats an addition to the same element."""
    for loop in _inner_loops(around, node):
        variables = _loop_variables([loop]) | _derived(loop)
        if not any(uses(index, variables) for index in indices):
            return True
    return False


def _recurrences(syntax: Syntax, function: Written, loop: Tree) -> Iterator[Finding]:
    """Several additions in one turn to a variable that goes round."""
    inside = {one["id"] for one in walk(loop) if one.get("kind") == "VarDecl"}
    for node, identity, indices, several in _sums(syntax, function, loop_body(loop)):
        if identity not in inside and (several or _is_serial(loop_body(loop), node, indices)):
            name = syntax.variables.get(identity, {}).get("name", "?")
            yield Finding(
                "recurrence",
                place(function, node),
                f"several additions to `{name}` follow each other in one turn of the loop of line {loop['line']}: they "
                "have to fit into one cycle. Sum in a variable of the turn, then add once",
            )


def _dependences(syntax: Syntax, function: Written, loop: Tree) -> Iterator[Finding]:
    """An element of an array that is read and written in a turn, without DEPENDENCE, in memory."""
    inside = {one["id"]: one for one in walk(loop) if one.get("kind") == "VarDecl"}
    for node in walk(loop_body(loop)):
        changed = _changes(node)
        if changed is None:
            continue
        identity, members, indices = root(changed[0])
        alias = inside.get(identity or "")
        if alias is not None and "&" in alias.get("type", {}).get("qualType", "") and alias.get("inner"):
            reads = _is_sum(node) or uses(changed[1], {identity or ""})
            identity, members, indices = root(alias["inner"][0])
        else:
            reads = _is_sum(node) or identity is not None and uses(changed[1], {identity})
        if not reads or not indices or identity is None or identity in inside:
            continue
        variable = syntax.variables.get(identity, {}).get("name", "?")
        name = ".".join([variable, *members])
        inner = _loop_variables(_inner_loops(loop, node))
        if _has_pragma(function, name, "DEPENDENCE") or _is_partitioned(syntax, identity, function, name, whole=True):
            continue
        if all(_is_constant(index, inner) for index in indices):
            continue
        yield Finding(
            "dependence",
            place(function, node),
            f"`{name}` is read, changed and written in a turn: without `#pragma HLS DEPENDENCE variable = {name} inter "
            "...` II = 1 is not met, or needs forwarding",
        )


def _is_constant(index: Tree, unrolled: set[str]) -> bool:
    """Whether an index is a number once inner loops are unrolled."""
    names = [part["referencedDecl"]["id"] for part in walk(index) if part.get("kind") == "DeclRefExpr"]
    return all(name in unrolled for name in names)


def _has_pragma(function: Written, name: str, *kinds: str) -> bool:
    """Whether a pragma of these kinds names a variable, or a whole of which it is a member."""
    for pragma in function.pragmas:
        given = pragma.options.get("variable", "")
        if pragma.kind in kinds and (name == given or name.startswith(f"{given}.") or given.startswith(f"{name}.")):
            return True
    return False


def _is_partitioned(syntax: Syntax, identity: str, function: Written, name: str, whole: bool = False) -> bool:
    kinds = ("ARRAY_PARTITION",) if whole else ("ARRAY_PARTITION", "ARRAY_RESHAPE", "AGGREGATE")
    found = [
        one
        for one in function.pragmas
        if one.kind in kinds and one.options.get("variable", "").split(".")[0] == name.split(".")[0]
    ]
    if not whole:
        return _has_pragma(function, name, *kinds)
    return any("complete" in one.options and one.options.get("dim", "0") == "0" for one in found)


def _wide(syntax: Syntax, name: str, depth: int = 0) -> Iterator[tuple[Tree, str, list[str]]]:
    """Arrays of which unrolled loops take several elements at a time: (node, variable, members), callees' too."""
    function = syntax.functions[name]
    for loop in walk(function.body):
        if loop.get("kind") != "ForStmt" or not function.loop_has(loop, "UNROLL"):
            continue
        variables = _loop_variables([loop]) | _derived(loop)
        for node in walk(loop_body(loop)):
            if node.get("kind") == "ArraySubscriptExpr" and uses(node["inner"][1], variables):
                identity, members, _ = root(node)
                if identity is not None:
                    yield node, identity, members
    for node in walk(function.body) if depth < 6 else ():
        callee = referred(node["inner"][0]) if node.get("kind") == "CallExpr" else None
        if callee not in syntax.functions:
            continue
        parameters = syntax.functions[callee].parameters
        for _, identity, members in _wide(syntax, callee, depth + 1):
            if identity in parameters and parameters.index(identity) + 1 < len(node["inner"]):
                given, outer, _ = root(node["inner"][1 + parameters.index(identity)])
                if given is not None:
                    yield node, given, [*outer, *members]


def _derived(loop: Tree) -> set[str]:
    """Variables of a loop's body that are made of its counter."""
    counters = _loop_variables([loop])
    return {
        one["id"]
        for one in walk(loop_body(loop))
        if one.get("kind") == "VarDecl" and "int" in one.get("type", {}).get("qualType", "") and uses(one, counters)
    }


def _partitions(syntax: Syntax, name: str) -> Iterator[Finding]:
    """Local arrays of which several elements are taken at a time, without a partition."""
    function = syntax.functions[name]
    local = {one["id"]: one for one in walk(function.body) if one.get("kind") == "VarDecl"}
    for node, identity, members in _wide(syntax, name):
        variable = local.get(identity)
        if variable is None or _is_stream(variable) or variable.get("storageClass") == "static":
            continue
        named = ".".join([variable["name"], *members])
        if not _is_partitioned(syntax, identity, function, named):
            yield Finding(
                "partition",
                place(function, variable),
                f"an unrolled loop (line {node.get('line')}) takes several elements of `{named}` at a time: a memory "
                f"gives two. Add `#pragma HLS ARRAY_PARTITION variable = {named} complete` (or cyclic), or AGGREGATE",
            )
