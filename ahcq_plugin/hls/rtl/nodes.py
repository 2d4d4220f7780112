# SPDX-License-Identifier: Apache-2.0
"""A graph of XLS operations, and its text. Operands may be filled in later: the text is sorted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ACTIONS = ("send", "receive", "next_value", "state_read", "identity")  # two of them are never the same


@dataclass(eq=False)
class Node:
    """An operation.

    Attributes:
        op: its name in XLS IR.
        kind: its type, as XLS writes it.
        args: operands, by position; of ``sel`` the selector and the cases.
        keys: further attributes, as text.
        predicate: operand of the attribute of this name.
        debug: the debug location of the C++ that it comes from, -1 without.
    """

    op: str
    kind: str
    args: list[Node] = field(default_factory=list)
    keys: tuple[str, ...] = ()
    predicate: Node | None = None
    debug: int = -1

    @property
    def bits(self) -> int:
        """Width of a word."""
        return int(self.kind[5:-1])

    @property
    def operands(self) -> Iterable[Node]:
        """What it needs."""
        return self.args if self.predicate is None else [*self.args, self.predicate]

    def text(self, names: dict[Node, str]) -> str:
        """The line of XLS IR."""
        words = [names[one] for one in self.args]
        if self.op == "sel":
            words = [words[0], f"cases=[{', '.join(words[1:])}]"]
        elif self.op in ("array_index", "array_update"):
            count = 1 if self.op == "array_index" else 2
            words = [*words[:count], f"indices=[{', '.join(words[count:])}]"]
        elif self.op == "next_value":
            words = [f"value={words[0]}"]
        words += [] if self.predicate is None else [f"predicate={names[self.predicate]}"]
        return f"  {names[self]}: {self.kind} = {self.op}({', '.join([*words, *self.keys])})"


class Graph:
    """Makes nodes; ``debug`` is the debug location of those that follow."""

    def __init__(self) -> None:
        self.debug = -1
        self.roots: list[Node] = []
        self._literals: dict[tuple[int, int], Node] = {}
        self._known: dict[tuple, Node] = {}
        self.zero, self.one = self.literal(1, 0), self.literal(1, 1)

    def node(
        self, op: str, kind: int | str, args: Sequence[Node] = (), *keys: str, predicate: Node | None = None
    ) -> Node:
        """A node; ``kind`` may be a number of bits. Equal operations are one node, but for ACTIONS."""
        kind = f"bits[{kind}]" if isinstance(kind, int) else kind
        if op in ACTIONS:
            return Node(op, kind, list(args), keys, predicate, self.debug)
        key = (op, kind, *args, *keys, predicate)
        if key not in self._known:
            self._known[key] = Node(op, kind, list(args), keys, predicate, self.debug)
        return self._known[key]

    def root(self, *args, **keys) -> Node:
        """A node that is kept though nobody uses it."""
        made = self.node(*args, **keys)
        self.roots.append(made)
        return made

    def literal(self, bits: int, value: int) -> Node:
        """A constant; negative values in two's complement."""
        value &= (1 << bits) - 1
        return self._literals.setdefault((bits, value), Node("literal", f"bits[{bits}]", [], (f"value={value}",)))

    def select(self, condition: Node, yes: Node, no: Node) -> Node:
        """``condition ? yes : no``."""
        if yes is no or condition is self.one:
            return yes
        return no if condition is self.zero else self.node("sel", yes.kind, [condition, no, yes])

    def any(self, *conditions: Node) -> Node:
        """The or of single bits; ``p and c`` with ``p and not c`` is ``p``, as where two branches meet again."""
        found = [one for one in dict.fromkeys(conditions) if one is not self.zero]
        while (pair := _meeting(found)) is not None:
            a, b, both = pair
            found = list(dict.fromkeys([*(one for one in found if one is not a and one is not b), both]))
        if not found or self.one in found:
            return self.one if found else self.zero
        return found[0] if len(found) == 1 else self.node("or", 1, found)

    def both(self, a: Node, b: Node) -> Node:
        """The and of two bits."""
        if a is self.one or b is self.one:
            return b if a is self.one else a
        return self.node("and", 1, [a, b])

    def slice(self, word: Node, start: int, width: int) -> Node:
        """``width`` bits from ``start`` on."""
        if start == 0 and width == word.bits:
            return word
        return self.node("bit_slice", width, [word], f"start={start}", f"width={width}")

    def extend(self, word: Node, width: int, sign: bool = False) -> Node:
        """``word`` with ``width`` bits: cut off, or filled with zeros or the sign."""
        if width <= word.bits:
            return self.slice(word, 0, width)
        return self.node("sign_ext" if sign else "zero_ext", width, [word], f"new_bit_count={width}")

    def concat(self, words: Sequence[Node]) -> Node:
        """One word; the first of ``words`` is its highest part."""
        words = list(words)
        return words[0] if len(words) == 1 else self.node("concat", sum(word.bits for word in words), words)

    def chosen(self, cases: Sequence[tuple[Node, Node]]) -> Node:
        """The value of the case whose condition holds (at most one does; if none, anything)."""
        value = cases[0][1]
        for condition, other in cases[1:]:
            value = self.select(condition, other, value)
        return value

    def text(self) -> list[str]:
        """The lines of all nodes that the roots need."""
        order = sorted_nodes(self.roots)
        names = {node: f"n{index}" for index, node in enumerate(order)}
        return [node.text(names) for node in order]


def _meeting(conditions: Sequence[Node]) -> tuple[Node, Node, Node] | None:
    """Two conditions ``p and c``, ``p and not c`` among some, and p."""
    known = {(frozenset(one.args)): one for one in conditions if one.op == "and"}
    for one in conditions:
        for last in one.args if one.op == "and" else ():
            if last.op == "not":
                common = [arg for arg in one.args if arg is not last]
                other = known.get(frozenset([*common, last.args[0]]))
                if other is not None and common:
                    return one, other, common[0]
    return None


def sorted_nodes(roots: Iterable[Node]) -> list[Node]:
    """``roots`` and all that they need, operands first. RecursionError is not possible; a cycle is a ValueError."""
    state: dict[Node, int] = {}
    order: list[Node] = []
    for root in roots:
        stack = [(root, iter(root.operands))] if root not in state else []
        state.setdefault(root, 1)
        while stack:
            node, operands = stack[-1]
            for operand in operands:
                if operand not in state:
                    state[operand] = 1
                    stack.append((operand, iter(operand.operands)))
                    break
                if state[operand] == 1 and operand is not node:
                    raise ValueError(f"a cycle through {operand.op} of {operand.keys}")
            else:
                state[node] = 2
                order.append(node)
                stack.pop()
    return order


def needs(node: Node, wanted: Node) -> bool:
    """Whether ``wanted`` is among what ``node`` needs."""
    seen, stack = {node}, [node]
    while stack:
        now = stack.pop()
        if now is wanted:
            return True
        for operand in now.operands:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return False
