# SPDX-License-Identifier: Apache-2.0
"""Instructions of LLVM IR that compute, as XLS operations."""

from __future__ import annotations

import re
from collections.abc import Callable

from ahcq_plugin.hls.rtl.floats import call_name
from ahcq_plugin.hls.rtl.llvm_types import Instruction
from ahcq_plugin.hls.rtl.nodes import Graph, Node

_INTEGER = {
    **dict(add="add", sub="sub", mul="smul", shl="shll", lshr="shrl", ashr="shra"),
    **{"and": "and", "or": "or", "xor": "xor", "udiv": "udiv", "urem": "umod", "sdiv": "sdiv", "srem": "smod"},
}
_SIGN = 1 << 31


class Outside(Exception):
    """An instruction is outside the subset; the message says what it is."""


class Values:
    """Makes nodes in ``graph``; ``functions`` collects the float functions that they call."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.functions: set[str] = set()

    def compute(self, one: Instruction, operand: Callable[[int], Node]) -> Node:
        """The result of ``one``, whose operands ``operand(i)`` gives.

        Raises:
            Outside: it is not in the subset.
        """
        graph, op, kind = self.graph, one.op, one.type
        if kind.kind not in ("int", "float") or any(arg.kind not in ("int", "float") for arg, _ in one.args):
            names = sorted({arg.kind for arg in (kind, *(arg for arg, _ in one.args))} - {"int", "float"})
            raise Outside(f"`{op}` of the type {', '.join(names)}")
        if op in _INTEGER:
            return graph.node(_INTEGER[op], kind.bits, [operand(0), operand(1)])
        if op == "icmp":
            return graph.node(one.detail, 1, [operand(0), operand(1)])
        if op == "select":
            return graph.select(operand(0), operand(1), operand(2))
        if op in ("zext", "trunc", "sext"):
            return graph.extend(operand(0), kind.bits, op == "sext")
        if op in ("freeze", "bitcast"):
            return operand(0)
        if op in ("fadd", "fmul"):
            return self.call(op, 32, operand(0), operand(1))
        if op == "fsub":
            return self.call("fadd", 32, operand(0), self.negative(operand(1)))
        if op == "fneg":
            return self.negative(operand(0))
        if op == "fcmp":
            return self._compare(one.detail, operand(0), operand(1))
        if op in ("sitofp", "uitofp", "fptosi", "fptoui"):
            bits = one.args[0][0].bits if op.endswith("tofp") else kind.bits
            return self.call(f"{op}_{bits}", kind.bits, operand(0))
        if op == "call":
            return self._intrinsic(one, operand)
        raise Outside(f"`{op}`")

    def call(self, function: str, bits: int, *args: Node) -> Node:
        """A call of a function of ``floats.x``."""
        self.functions.add(function)
        return self.graph.node("invoke", bits, args, f"to_apply={call_name(function)}")

    def negative(self, word: Node) -> Node:
        """A float with the other sign."""
        return self.graph.node("xor", 32, [word, self.graph.literal(32, _SIGN)])

    def _compare(self, predicate: str, a: Node, b: Node) -> Node:
        graph = self.graph
        if predicate in ("true", "false"):
            return graph.one if predicate == "true" else graph.zero
        unordered = predicate[0] == "u"
        if predicate in ("ord", "uno"):
            found = self.call("unordered", 1, a, b)
            return found if unordered else graph.node("not", 1, [found])
        # u.. is the opposite of the ordered opposite
        opposite = {"eq": "ne", "ne": "eq", "gt": "le", "le": "gt", "lt": "ge", "ge": "lt"}
        relation = opposite[predicate[1:]] if unordered else predicate[1:]
        if relation == "eq":
            found = self.call("equal", 1, a, b)
        else:
            parts = []
            if relation in ("gt", "ge", "ne"):
                parts.append(self.call("greater", 1, a, b))
            if relation in ("lt", "le", "ne"):
                parts.append(self.call("greater", 1, b, a))
            if relation in ("ge", "le"):
                parts.append(self.call("equal", 1, a, b))
            found = graph.any(*parts)
        return graph.node("not", 1, [found]) if unordered else found

    def _intrinsic(self, one: Instruction, operand: Callable[[int], Node]) -> Node:
        graph, bits = self.graph, one.type.bits
        name = re.sub(r"\.[if]\d+(\.i\d+)?$", "", one.detail).removeprefix("llvm.")
        if name in ("umax", "umin", "smax", "smin"):
            a, b = operand(0), operand(1)
            return graph.select(graph.node(name[0] + ("gt" if name.endswith("max") else "lt"), 1, [a, b]), a, b)
        if name == "abs":
            a = operand(0)
            return graph.select(graph.slice(a, bits - 1, 1), graph.node("neg", bits, [a]), a)
        if name == "fabs":
            return graph.node("and", 32, [operand(0), graph.literal(32, _SIGN - 1)])
        if name in ("fshl", "fshr"):
            return self._funnel(name, operand(0), operand(1), operand(2))
        if name in ("uadd.sat", "usub.sat", "sadd.sat", "ssub.sat"):
            return self._saturated(name, operand(0), operand(1))
        if name in ("ctlz", "cttz"):
            a = operand(0) if name == "cttz" else graph.node("reverse", bits, [operand(0)])
            hot = graph.node("one_hot", bits + 1, [a], "lsb_prio=true")
            return graph.extend(graph.node("encode", bits.bit_length(), [hot]), bits)
        if name == "ctpop":
            ones = [graph.extend(graph.slice(operand(0), i, 1), bits) for i in range(bits)]
            return self._sum(ones)
        if name == "bitreverse":
            return graph.node("reverse", bits, [operand(0)])
        if name == "bswap":
            return graph.concat([graph.slice(operand(0), at, 8) for at in range(0, bits, 8)])
        raise Outside(f"a call of `{one.detail}`")

    def _sum(self, words: list[Node]) -> Node:
        while len(words) > 1:
            pairs = [self.graph.node("add", words[0].bits, pair) for pair in zip(words[::2], words[1::2], strict=False)]
            words = pairs + words[len(pairs) * 2 :]
        return words[0]

    def _funnel(self, name: str, high: Node, low: Node, by: Node) -> Node:
        graph, bits = self.graph, high.bits
        by = graph.node("umod", bits, [by, graph.literal(bits, bits)]) if bits & (bits - 1) else by
        by = by if bits & (bits - 1) else graph.node("and", bits, [by, graph.literal(bits, bits - 1)])
        both = graph.concat([high, low])
        by = graph.extend(by, 2 * bits)
        moved = graph.node("shll" if name == "fshl" else "shrl", 2 * bits, [both, by])
        return graph.slice(moved, bits if name == "fshl" else 0, bits)

    def _saturated(self, name: str, a: Node, b: Node) -> Node:
        graph, bits, sign = self.graph, a.bits, name[0] == "s"
        op = name[1:4]
        wide = graph.node(op, bits + 2, [graph.extend(a, bits + 2, sign), graph.extend(b, bits + 2, sign)])
        top = graph.literal(bits + 2, 2 ** (bits - sign) - 1)
        low = graph.literal(bits + 2, -(2 ** (bits - 1)) if sign else 0)
        wide = graph.select(graph.node("sgt", 1, [wide, top]), top, wide)
        return graph.slice(graph.select(graph.node("slt", 1, [wide, low]), low, wide), 0, bits)
