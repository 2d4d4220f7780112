# SPDX-License-Identifier: Apache-2.0
"""What a prepared unit's graph shows without data: layers and matmuls that compute on unquantized values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.allowed import find_uncovered, is_left
from ahcq_plugin.graph.ops import GraphIndex, layer_input, matmul_operands
from ahcq_plugin.graph.positions import exception_of
from ahcq_plugin.quantizers import FakeQuantize

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def unquantized(unit: fx.GraphModule) -> list[str]:
    """One line for every Linear, Conv2d and matmul of a prepared unit that computes on unquantized values, and for all
    that is on no list of what may stay in floating point. ``prepare`` refuses such a unit, the audit reports it."""
    index = GraphIndex(unit, unit.graph)
    problems = [str(item) for item in find_uncovered(unit)]
    for node in unit.graph.nodes:
        if is_left(unit, node) or exception_of(index, node):
            continue
        if index.is_layer(node):
            if not isinstance(getattr(index.module(node), "weight_fake_quant", None), FakeQuantize):
                problems.append(f"{node.target}: its weight has no quantizer")
            if not _is_quantizer(index, layer_input(node)[1]):
                problems.append(f"{node.target}: its input is not quantized")
        elif index.is_matmul(node):
            for side, (_, operand) in zip(("left", "right"), matmul_operands(node), strict=True):
                if not _comes_from_quantizer(index, operand):
                    problems.append(f"{node.name}: its {side} operand is not quantized")
    return problems


def _is_quantizer(index: GraphIndex, node: fx.Node) -> bool:
    return isinstance(index.module(node), FakeQuantize)


def _comes_from_quantizer(index: GraphIndex, node: fx.Node) -> bool:
    """Whether only changes of shape and scalar factors stand between a quantizer and the tensor ``node``."""
    *between, source = index.walk_back(node)
    return _is_quantizer(index, source) and not any(_changes_values(index, step) for step in between)


def _changes_values(index: GraphIndex, node: fx.Node) -> bool:
    """Whether a node that passes for a change of shape does more: dropout that is on, padding with something but 0.

    Zeros from padding add nothing to a product.
    """
    if node.target in (F.dropout, torch.dropout):
        return _given(node, 2, "train" if node.target is torch.dropout else "training", True) is not False
    if node.target is F.pad:
        return _given(node, 3, "value", None) not in (None, 0)
    return isinstance(index.module(node), DROPOUTS) and index.module(node).training


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
