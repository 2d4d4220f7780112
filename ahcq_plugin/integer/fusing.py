# SPDX-License-Identifier: Apache-2.0
"""Parts of a rewritten graph that are computed block by block: attention, and MLPs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph.ops import ACTIVATION_MODULES, ACTIVATIONS, function_name
from ahcq_plugin.graph.positions import DECOMPOSED
from ahcq_plugin.graph.relative_positions import add_relative_positions
from ahcq_plugin.integer.attention import IntegerAttention, PickedPositions, RelativePositions
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.layers import EncodedLinear, IntegerConv2d, IntegerLinear
from ahcq_plugin.integer.mlp import IntegerMLP
from ahcq_plugin.integer.products import IntegerProduct

_FACTORS = {
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div"),
}
_SKIPPED = (nn.Identity, nn.Dropout)


def fuse_sums(graph: fx.Graph, targets: Mapping[str, Any]) -> None:
    """Let encoders for Linear layers add up two tensors whose sum nothing else reads."""
    for node in graph.nodes:
        encoder = targets.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(encoder, Encoder) or not encoder.rows:
            continue
        total = node.args[0]
        is_sum = total.op == "call_function" and total.target in (operator.add, torch.add) and not total.kwargs
        tensors = all(isinstance(part, fx.Node) and not _is_number(part) for part in total.args)
        if is_sum and tensors and len(total.users) == 1:
            node.args = total.args
            graph.erase_node(total)


def reads_rows(module: nn.Module | None) -> bool:
    """Whether a module reads codes row by row: Linear layers, but no convolutions."""
    return isinstance(module, IntegerLinear | EncodedLinear | IntegerMLP) and not isinstance(module, IntegerConv2d)


def fuse_attention(graph: fx.Graph, targets: dict[str, Any]) -> None:
    """Replace ``qk``, scalar factors, relative positions, softmax, encoder, ``av`` by one ``IntegerAttention``."""
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(targets.get(node.target), IntegerProduct):
            continue
        left, values = node.args
        if left.op != "call_module" or not isinstance(targets.get(left.target), Encoder) or len(left.users) != 1:
            continue
        chain = _scores(left.args[0], targets)
        if chain is None:
            continue
        product, factors, positions = chain
        scalars = tuple(_scalar(step) for step in factors)
        with graph.inserting_before(node):
            terms = None
            if positions is not None:
                name = f"{positions.name}_terms"
                quantized = positions.target is add_relative_positions
                targets[name] = PickedPositions() if quantized else RelativePositions(positions.target)
                terms = graph.call_module(name, positions.args[1:])
            name = f"{node.name}_attention"
            targets[name] = IntegerAttention(
                targets[product.target],
                targets[left.target],
                targets[node.target],
                tuple(_FACTORS[step.target] for step in factors),
            )
            fused = graph.call_module(name, (*product.args, values, scalars, terms))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)


def _scores(softmax: fx.Node, targets: Mapping[str, Any]) -> tuple[fx.Node, list[fx.Node], fx.Node | None] | None:
    """(product, scalings in order, node of relative positions) that a softmax over the last axis reads, each read by
    nothing else; None for anything else."""
    name = softmax.target if softmax.op == "call_method" else function_name(softmax)
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if name != "softmax" or dim != -1 or softmax.kwargs.get("dtype") or len(softmax.users) != 1:
        return None
    node, positions, factors = softmax.args[0], None, []
    while len(node.users) == 1:
        if isinstance(targets.get(str(node.target)), IntegerProduct):
            return node, factors[::-1], positions
        if not factors and positions is None and _adds_positions(node):
            positions, node = node, node.args[0]
        elif node.target in _FACTORS and len(node.args) == 2 and not node.kwargs:
            tensor = node.args[0]
            if not isinstance(tensor, fx.Node) or _is_number(node.args[0]) or not _is_number(node.args[1]):
                return None
            factors.append(node)
            node = tensor
        else:
            return None
    return None


def _adds_positions(node: fx.Node) -> bool:
    if node.target is add_relative_positions:
        return True
    is_function = function_name(node) == DECOMPOSED and len(node.args) == 6 and not node.kwargs
    return is_function and RelativePositions.can_replace(node.target)


def _scalar(step: fx.Node) -> Any:
    return step.args[1]


def _is_number(value: Any) -> bool:
    """A number, or a node that computes one from numbers."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float)
    plain = value.op == "call_function" and getattr(value.target, "__module__", "") in ("math", "_operator")
    return value.target == "size" or (plain and all(map(_is_number, value.all_input_nodes))) or _is_size(value)


def _is_size(value: fx.Node) -> bool:
    return value.target is operator.getitem and isinstance(value.args[0], fx.Node) and value.args[0].target is getattr


def fuse_mlp(graph: fx.Graph, targets: dict[str, Any], unit: nn.Module) -> None:
    """Replace a Linear, activations, an encoder and a Linear, each read by the next alone, by one ``IntegerMLP``."""
    for node in list(graph.nodes):
        second = _layer(node, targets)
        if second is None:
            continue
        coder = node.args[0]
        if coder.op != "call_module" or not isinstance(targets.get(coder.target), Encoder) or len(coder.users) != 1:
            continue
        activations: list[Callable[[Tensor], Tensor]] = []
        before = coder.args[0]
        while len(before.users) == 1 and (found := _activation(before, unit, targets)) is not None:
            activations.insert(0, found)
            before = before.args[0]
        first = _layer(before, targets)
        if first is None or len(before.users) != 1:
            continue
        name = f"{node.name}_mlp"
        targets[name] = IntegerMLP(first, tuple(activations), targets[coder.target], second)
        with graph.inserting_before(node):
            fused = graph.call_module(name, before.args)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)


def _layer(node: fx.Node, targets: Mapping[str, Any]) -> IntegerLinear | None:
    layer = targets.get(str(node.target)) if node.op == "call_module" else None
    return layer if isinstance(layer, IntegerLinear) and not isinstance(layer, IntegerConv2d) else None


def _activation(node: fx.Node, unit: nn.Module, targets: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a node does, if it is an activation, or dropout that is off."""
    if node.op == "call_module" and node.target not in targets and len(node.args) == 1 and not node.kwargs:
        module = unit.get_submodule(str(node.target))
        return module if isinstance(module, (*ACTIVATION_MODULES, *_SKIPPED)) and not module.training else None
    is_function = node.op == "call_function" and node.target in ACTIVATIONS and len(node.args) == 1
    return partial(node.target, **node.kwargs) if is_function else None
