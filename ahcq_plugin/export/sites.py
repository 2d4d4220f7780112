# SPDX-License-Identifier: Apache-2.0
"""Where the matmuls of a quantized unit are in its traced graph, and which quantizers their operands come from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.ops import WINDOW_FUNCTIONS, GraphIndex, function_name, matmul_operands
from ahcq_plugin.quantizers import FakeQuantize, QuantConv2d, QuantLinear


@dataclass(frozen=True)
class OperandSource:
    """Where one operand of a matmul comes from.

    Attributes:
        quantizer: node of the fake quantizer that it comes from.
        path: nodes from the quantizer (left out) to the operand itself (included), each computed from the one before;
            they reshape, permute, index, or multiply by a scalar.
        scalings: those of them that multiply by a scalar.
    """

    quantizer: fx.Node
    path: tuple[fx.Node, ...]
    scalings: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Site:
    """One matmul: ``layer`` is the called Linear or Conv2d, None for a product of two activations."""

    node: fx.Node
    kind: str
    left: OperandSource
    right: OperandSource | None
    layer: nn.Module | None


def find_sites(gm: fx.GraphModule) -> tuple[list[Site], dict[str, str]]:
    """The matmuls of a quantized unit, in the order of execution.

    Returns:
        (sites, left out): the latter names nodes of layers and matmuls that no spec can hold, with the reason.
    """
    index = GraphIndex(gm, gm.graph)
    sites, left_out = [], {}
    for node in gm.graph.nodes:
        try:
            if index.is_layer(node):
                sites.append(_layer_site(index, node))
            elif index.is_matmul(node):
                sites.append(_product_site(index, node))
        except _LeftOut as reason:
            left_out[node.name] = str(reason)
    return sites, left_out


class _LeftOut(Exception):
    pass


def _layer_site(index: GraphIndex, node: fx.Node) -> Site:
    layer = index.module(node)
    if not isinstance(layer, QuantLinear | QuantConv2d):
        raise _LeftOut("its weight has no quantizer")
    if isinstance(layer, QuantConv2d):
        if layer.dilation != (1, 1):
            raise _LeftOut(f"a convolution with dilation {layer.dilation}, not (1, 1)")
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise _LeftOut(f"a convolution with padding {layer.padding!r} ({layer.padding_mode})")
    source = node.args[0] if node.args else node.kwargs["input"]
    return Site(node, "linear", _source(index, source), None, layer)


def _product_site(index: GraphIndex, node: fx.Node) -> Site:
    if "baddbmm" in str(node.target):
        raise _LeftOut("baddbmm adds a third operand")
    left, right = (_source(index, operand) for _, operand in matmul_operands(node))
    roles = [index.module(operand.quantizer).role for operand in (left, right)]
    if roles[1] == "softmax":
        raise _LeftOut("attention probabilities are its right operand")
    return Site(node, "av" if roles[0] == "softmax" else "qk", left, right, None)


def _source(index: GraphIndex, node: fx.Node) -> OperandSource:
    """Walk back from an operand to its fake quantizer."""
    path, scalings = [], []
    while not isinstance(index.module(node), FakeQuantize):
        source, scaled = index.shape_source(node), index.scale_source(node)
        if function_name(node) in WINDOW_FUNCTIONS or node.target is F.pad:
            raise _LeftOut(f"node '{node.name}' pads with zeros behind the quantizer")
        if source is None and scaled is None:
            raise _LeftOut(f"its operand comes from node '{node.name}', not from a quantizer")
        if source is None:
            scalings.insert(0, node)
        path.insert(0, node)
        node = scaled if source is None else source
    return OperandSource(node, tuple(path), tuple(scalings))
