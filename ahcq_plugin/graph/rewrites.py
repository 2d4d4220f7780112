# SPDX-License-Identifier: Apache-2.0
"""Graph rewrites that expose what fused operators hide."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _side_effectful_functions
from torch.nn import functional as F

from ahcq_plugin.graph.ops import MATMULS

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def expand_fused_attention(graph: fx.Graph) -> int:
    """Replace ``F.scaled_dot_product_attention`` by matmul, scale, mask, softmax, matmul, in place.

    softmax(q kᵀ · scale + mask) v with scale = 1/sqrt(head width) by default; equal to the fused operator up to
    float rounding, except that a row whose mask forbids every key gives NaN, where newer fused kernels give 0.

    Returns:
        The number of replaced calls.
    Raises:
        ValueError: attention dropout, grouped queries, or ``is_causal`` and the like known only at run time.
    """
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target is F.scaled_dot_product_attention]
    for node in calls:
        arguments = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        _check(arguments)
        before = set(graph.nodes)
        with graph.inserting_before(node):
            context = _attention(graph, arguments)
        node.replace_all_uses_with(context)
        for made in set(graph.nodes) - before:
            made.meta.update(node.meta)
            made.stack_trace = node.stack_trace
        graph.erase_node(node)
    if calls:
        graph.lint()
    return len(calls)


def erase_unused_products(graph: fx.Graph) -> int:
    """Erase matmuls, and the softmax and arithmetic behind them, whose results nothing reads, in place.

    transformers' SAM 2 computes attention weights twice and uses one of them.

    Returns:
        The number of erased nodes.
    """
    erased = 0
    for product in [n for n in graph.nodes if n.op in ("call_function", "call_method") and n.target in MATMULS]:
        behind, stack = {product}, [product]
        while stack:
            fresh = [user for user in stack.pop().users if user not in behind]
            behind.update(fresh)
            stack.extend(fresh)
        if all(map(_is_pure, behind)):
            for node in reversed([n for n in graph.nodes if n in behind]):
                graph.erase_node(node)
            erased += len(behind)
    return erased


def _is_pure(node: fx.Node) -> bool:
    """Only computes its result."""
    name = str(getattr(node.target, "__name__", node.target))
    is_in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")
    return (
        node.op in ("call_function", "call_method") and not is_in_place and node.target not in _side_effectful_functions
    )


def _check(arguments: dict[str, Any]) -> None:
    for name in ("dropout_p", "is_causal", "enable_gqa"):
        if isinstance(arguments[name], fx.Node):
            raise ValueError(f"scaled_dot_product_attention: `{name}` must be known when tracing, got a traced value")
    for name in ("dropout_p", "enable_gqa"):
        if arguments[name]:
            got = f"`{name}={arguments[name]}`"
            raise ValueError(f"scaled_dot_product_attention: {got} is not supported, expected {_DEFAULTS[name]}")
    unknown = set(arguments) - set(_ARGUMENTS)
    if unknown:
        raise ValueError(f"scaled_dot_product_attention: unknown arguments {sorted(unknown)}")


def _attention(graph: fx.Graph, arguments: dict[str, Any]) -> fx.Node:
    query, key, value, scale = (arguments[name] for name in ("query", "key", "value", "scale"))
    scores = graph.call_function(torch.matmul, (query, graph.call_method("transpose", (key, -2, -1))))
    if scale is None:
        width = graph.call_method("size", (query, -1))
        scores = graph.call_function(operator.truediv, (scores, graph.call_function(math.sqrt, (width,))))
    else:
        scores = graph.call_function(operator.mul, (scores, scale))
    if arguments["is_causal"]:
        scores = graph.call_function(mask_causal, (scores,))
    if arguments["attn_mask"] is not None:
        scores = graph.call_function(mask_scores, (scores, arguments["attn_mask"]))
    weights = graph.call_function(torch.softmax, (scores,), {"dim": -1})
    return graph.call_function(torch.matmul, (weights, value))


def mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply an attention mask.

    Args:
        scores: (..., queries, keys) floats.
        mask: broadcastable to ``scores``; bool (True keeps a key) or float (added); None leaves the scores alone.
    """
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def mask_causal(scores: Tensor) -> Tensor:
    """Forbid keys after the query: (..., queries, keys) scores, aligned at the top left like the fused operator."""
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~allowed, -math.inf)
