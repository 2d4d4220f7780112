# SPDX-License-Identifier: Apache-2.0
"""Encodings of positions, which stay in floating point in a unit: named exceptions to what must be quantized."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.fixed import put
from ahcq_plugin.graph.multihead import mask_heads
from ahcq_plugin.graph.ops import EINSUMS, SHAPE_FUNCTIONS, SHAPE_METHODS, WINDOW_FUNCTIONS, GraphIndex, function_name
from ahcq_plugin.graph.rewrites import mask_scores
from ahcq_plugin.graph.untraceable import ROTARY_FUNCTIONS, rotate

RELATIVE_POSITIONS = "relative positions"
ROTARY_POSITIONS = "rotary positions"
POSITION_TABLES = "position tables"
#: SAM's function of relative positions, kept whole.
DECOMPOSED = "add_decomposed_rel_pos"

#: Functions and methods that move elements about, besides those that change shapes.
MOVES = (
    "cat stack concat concatenate gather index_select masked_select masked_fill masked_scatter take flip meshgrid sort "
    "topk"
)
#: Functions kept whole that multiply in floating point: name -> what they are called in coverage.
_EXCEPTIONS = {DECOMPOSED: RELATIVE_POSITIONS, **dict.fromkeys(ROTARY_FUNCTIONS, ROTARY_POSITIONS)}
_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, mask_scores, mask_heads, "add", "add_"})
_MOVES = (
    SHAPE_FUNCTIONS
    | SHAPE_METHODS
    | {F.interpolate, *MOVES.split()}
    | {getattr(torch, name) for name in MOVES.split() if hasattr(torch, name)}
)
#: Functions kept whole that only move elements about.
MOVING_FUNCTIONS = frozenset({"get_rel_pos", *WINDOW_FUNCTIONS})


def exception_of(index: GraphIndex, node: fx.Node) -> str | None:
    """The name under which ``node`` may multiply in floating point, None for all other nodes."""
    if node.op == "call_function" and node.target is rotate:
        return ROTARY_POSITIONS
    named = _EXCEPTIONS.get(function_name(node) or "")
    return named or (RELATIVE_POSITIONS if _is_relative_position(index, node) else None)


def position_table(index: GraphIndex, node: fx.Node) -> str | None:
    """What a get_attr node is called in coverage if it is only moved about and then added, or goes into the node of an
    exception; None if it is used in any other way, or not at all."""
    label, stack, seen = None, [node], {node}
    while stack:
        for user in stack.pop().users:
            if user in seen or index.is_scalar(user):
                continue
            seen.add(user)
            exception = exception_of(index, user)
            if exception:
                label = exception
            elif _adds(user):
                label = label or POSITION_TABLES
            elif _moves(user):
                stack.append(user)
            else:
                return None
    return label


def _adds(node: fx.Node) -> bool:
    return node.op.startswith("call_") and node.target in _ADDITIONS


def _moves(node: fx.Node) -> bool:
    return node.op.startswith("call_") and (node.target in _MOVES or function_name(node) in MOVING_FUNCTIONS)


def _is_relative_position(index: GraphIndex, node: fx.Node) -> bool:
    """A product of a tensor with a table of parameters that is only added to the scores of an attention.

    The scores are a product of two tensors themselves, so a table in the place of queries is none.
    """
    if node.target not in EINSUMS and not index.is_matmul(node):
        return False
    factors = [n for n in node.all_input_nodes if not index.is_scalar(n)]
    return len(factors) == 2 and sum(_is_table(index, n) for n in factors) == 1 and _is_added_to_scores(index, node)


def _is_table(index: GraphIndex, node: fx.Node) -> bool:
    """Computed from parameters and sizes alone, without a layer."""
    sources = list(index.ancestors(node, index.is_layer))
    if any(n.op == "placeholder" or index.is_layer(n) for n in sources):
        return False
    return any(n.op == "get_attr" and _is_parameter(index, n) for n in sources)


def _is_parameter(index: GraphIndex, node: fx.Node) -> bool:
    return isinstance(operator.attrgetter(str(node.target))(index.root), nn.Parameter)


def _is_added_to_scores(index: GraphIndex, node: fx.Node) -> bool:
    sums = list(_sums_behind(index, node))
    if not sums or None in sums:
        return False
    return any(_is_product(index, n, node) for total in sums for n in index.ancestors(total, lambda n: _ends(index, n)))


def _ends(index: GraphIndex, node: fx.Node) -> bool:
    return index.is_layer(node) or index.is_matmul(node) or node.target in EINSUMS


def _is_product(index: GraphIndex, node: fx.Node, other: fx.Node) -> bool:
    if node is other or not index.is_matmul(node):
        return False
    return not any(_is_table(index, factor) for factor in node.all_input_nodes if not index.is_scalar(factor))


def _sums_behind(index: GraphIndex, node: fx.Node) -> Iterator[fx.Node | None]:
    """The additions that ``node`` reaches before softmax; None where it goes elsewhere, or into softmax unadded."""
    stack: list[tuple[fx.Node, fx.Node | None]] = [(node, None)]
    while stack:
        current, total = stack.pop()
        for user in current.users:
            if index.is_scalar(user):
                continue
            if index.is_softmax(user):
                yield total
            elif _adds(user) or user.target is put:
                stack.append((user, user))
            elif _moves(user) or index.scale_source(user) is not None:
                stack.append((user, total))
            else:
                yield None
