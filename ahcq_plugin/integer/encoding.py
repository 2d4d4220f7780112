# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose outputs are only encoded: they give codes, and shapes are changed on codes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ahcq_plugin.integer.encoder import ChannelCoder, Decoder, Encoder
from ahcq_plugin.integer.layers import EncodedLinear, IntegerConv2d, IntegerLinear

_MOVES = frozenset(
    ("reshape", "view", "flatten", "unflatten", "permute", "transpose", "unbind", "chunk", "split", "movedim", "select")
)
#: Two choices of sizes in front of the channels: what holds for both holds for all.
_SIZES = ((2, 3, 5), (3, 1, 2))
_RANKS = (3, 4, 2)


def encode_outputs(graph: fx.Graph, targets: dict[str, Any]) -> None:
    """Let a Linear give codes where its outputs are only moved about and then encoded, uniformly.

    Which channels an encoder reads is found by moving channel numbers about, for sizes that stand for all.
    """
    for node in list(graph.nodes):
        layer = targets.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, IntegerLinear) or isinstance(layer, IntegerConv2d):
            continue
        found = _moves_and_encoders(node, targets)
        if found is None:
            continue
        moves, coders = found
        channels = _channels(graph, node, layer.n, moves, coders)
        if channels is None:
            continue
        encoders = [targets[str(coder.target)] for coder in coders]
        targets[f"{node.target}_encoded"] = EncodedLinear(layer, ChannelCoder(encoders, channels, layer.n))
        node.target = f"{node.target}_encoded"
        for coder in coders:
            _remove(graph, coder, targets)


def _moves_and_encoders(start: fx.Node, targets: Mapping[str, Any]) -> tuple[set[fx.Node], list[fx.Node]] | None:
    """Nodes that move the outputs about, and those that encode them; None where something else reads them."""
    moves, coders, stack = set[fx.Node](), list[fx.Node](), [start]
    while stack:
        for user in stack.pop().users:
            encoder = targets.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(encoder, Encoder) and encoder.family == "uniform" and encoder.scale.numel() == 1:
                coders.append(user)
            elif _is_size(user):
                continue
            elif user.op == "call_method" and user.target in _MOVES or user.target in (operator.getitem, torch.unbind):
                if user not in moves:
                    moves.add(user)
                    stack.append(user)
            else:
                return None
    if not coders or len({targets[str(coder.target)].bits for coder in coders}) > 1:
        return None
    return moves, coders


def _is_size(node: fx.Node) -> bool:
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "ndim"))


def _channels(
    graph: fx.Graph, start: fx.Node, n: int, moves: set[fx.Node], coders: list[fx.Node]
) -> list[Tensor] | None:
    """The channels that each encoder reads: all of them together, none twice; None where that is not so."""
    for rank in _RANKS:
        tried = []
        for sizes in _SIZES:
            try:
                tried.append(_moved(graph, start, n, sizes[: rank - 1], moves, coders))
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
                break
        if len(tried) == len(_SIZES) and all(map(torch.equal, *tried)):
            every = torch.cat(tried[0])
            is_split = len(every) == n and torch.equal(every.sort().values, torch.arange(n))
            return tried[0] if is_split else None
    return None


def _moved(
    graph: fx.Graph, start: fx.Node, n: int, sizes: tuple[int, ...], moves: set[fx.Node], coders: list[fx.Node]
) -> list[Tensor]:
    """Channel numbers as each encoder would get them, for outputs (*sizes, n); KeyError for what is not known."""
    shape = torch.Size((*sizes, n))
    values: dict[fx.Node, Any] = {start: torch.arange(n).expand(shape)}
    for node in graph.nodes:
        if node.target is getattr and node.args[1] == "shape":
            values[node] = values[node.args[0]].shape if node.args[0] in values else shape
        elif node.target == "size":
            values[node] = values.get(node.args[0], values[start]).size(*node.args[1:])
        elif node in moves or _is_arithmetic(node):
            args, kwargs = (map_arg(part, values.get) for part in (node.args, node.kwargs))
            if None in args:
                continue
            on = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
            values[node] = on(*args, **kwargs)
    return [values[coder.args[0]].unique() for coder in coders]


def _is_arithmetic(node: fx.Node) -> bool:
    """Arithmetic of sizes; of anything else the arguments are not known."""
    return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "math")


def _remove(graph: fx.Graph, coder: fx.Node, targets: Mapping[str, Any]) -> None:
    """Take an encoder out of a graph whose tensors are codes already."""
    source = coder.args[0]
    modules = [targets.get(str(user.target)) if user.op == "call_module" else None for user in coder.users]
    if any(module is None or isinstance(module, Decoder) for module in modules):
        with graph.inserting_before(coder):  # other nodes may view it as the encoder's dense result
            source = graph.call_method("contiguous", (source,))
    coder.replace_all_uses_with(source)
    graph.erase_node(coder)
