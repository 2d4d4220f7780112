# SPDX-License-Identifier: Apache-2.0
"""Sums put so that what goes round from turn to turn is added last: a compiler may have put it first.

Sums of integers of one width wrap and may be taken in any order. Vitis does the same (EXPRESSION_BALANCE).
"""

from __future__ import annotations

from collections import Counter

from ahcq_plugin.hls.rtl.nodes import Graph, Node, sorted_nodes


def balance(graph: Graph, states: dict[str, tuple[Node, Node]]) -> None:
    """Rebuild the sums of ``graph`` that are in a circle; ``states``: name -> (its value, its next value)."""
    order = sorted_nodes(graph.roots)
    uses = Counter(operand for node in order for operand in node.operands)
    needs, feeds = _circles(order, states)
    inner = {
        operand
        for node in order
        if node.op in ("add", "sub")
        for operand in node.args
        if operand.op in ("add", "sub") and uses[operand] == 1
    }
    for node in order:
        if node.op not in ("add", "sub") or node in inner or not feeds[node]:
            continue
        terms = _terms(node, inner)
        late = [term for term in terms if needs[term[0]] & feeds[node]]
        if len(terms) < 3 or not late or len(late) == len(terms):
            continue
        early = [term for term in terms if not needs[term[0]] & feeds[node]]
        graph.debug = node.debug
        first, last = _sum(graph, early), _sum(graph, late)
        node.op, node.args = "add", [first, last]
    graph.debug = -1


def _circles(order: list[Node], states: dict[str, tuple[Node, Node]]) -> tuple[dict[Node, int], dict[Node, int]]:
    """For every node, as bits: states that it needs, and states whose next values need it."""
    needs: dict[Node, int] = {}
    bit = {read: 1 << index for index, (read, _) in enumerate(states.values())}
    for node in order:
        needs[node] = bit.get(node, 0)
        for operand in node.operands:
            needs[node] |= needs[operand]
    feeds = dict.fromkeys(order, 0)
    for index, (_, following) in enumerate(states.values()):
        feeds[following] |= 1 << index
    for node in reversed(order):
        for operand in node.operands:
            feeds[operand] |= feeds[node]
    return needs, feeds


def _terms(root: Node, inner: set[Node]) -> list[tuple[Node, bool]]:
    """What a sum is made of: (term, whether it is subtracted)."""
    found, stack = [], [(root, False)]
    while stack:
        node, minus = stack.pop()
        if node is root or node in inner:
            stack.append((node.args[1], minus != (node.op == "sub")))
            stack.append((node.args[0], minus))
        else:
            found.append((node, minus))
    return found


def _sum(graph: Graph, terms: list[tuple[Node, bool]]) -> Node:
    """A tree of additions; what is subtracted is negated as a sum."""
    plus, minus = [node for node, sign in terms if not sign], [node for node, sign in terms if sign]
    bits = terms[0][0].bits
    if not minus:
        return _tree(graph, plus)
    if not plus:
        return graph.node("neg", bits, [_tree(graph, minus)])
    return graph.node("sub", bits, [_tree(graph, plus), _tree(graph, minus)])


def _tree(graph: Graph, words: list[Node]) -> Node:
    while len(words) > 1:
        pairs = [graph.node("add", words[0].bits, pair) for pair in zip(words[::2], words[1::2], strict=False)]
        words = pairs + words[2 * len(pairs) :]
    return words[0]
