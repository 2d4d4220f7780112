# SPDX-License-Identifier: Apache-2.0
"""A prepared unit's graph rewritten: codes flow where fake-quantized values flowed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ahcq_plugin.export.sites import OperandSource, Site, find_sites
from ahcq_plugin.graph.ops import GraphIndex, function_name
from ahcq_plugin.graph.tracer import check_fixed
from ahcq_plugin.integer.attention import IntegerAttention, RelativePositions
from ahcq_plugin.integer.encoder import Decoder, Encoder
from ahcq_plugin.integer.products import IntegerProduct

_CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
_SIZES = frozenset({"size", "dim", "numel"})
_FACTORS = {
    operator.mul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    operator.truediv: "div",
    torch.div: "div",
    "div": "div",
}


class Rewriter:
    """Copies a unit's graph; every quantizer becomes an encoder, every matmul one on codes.

    What reads a quantizer's values in floating point (relative positions) reads a decoder's. Sizes are read off the
    codes.

    Args:
        unit: prepared and frozen.
        modules: what stands for each quantizer (an ``Encoder``), layer and product, by the name of its node; a
            product's is called as its node.
    """

    def __init__(self, unit: fx.GraphModule, modules: Mapping[str, nn.Module]):
        self.unit, self.index, self.modules = unit, GraphIndex(unit, unit.graph), dict(modules)
        self.sites: dict[fx.Node, Site] = {site.node: site for site in find_sites(unit)[0]}
        operands = [o for site in self.sites.values() for o in (site.left, site.right) if o is not None]
        self.steps = {node: operand for operand in operands for node in operand.path}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.codes: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """The unit on integers; float modules and tensors in it are shared with ``unit``."""
        targets: dict[str, Any] = {}
        for node in self.unit.graph.nodes:
            self._copy(node, targets)
        self.graph.eliminate_dead_code(_stays)
        _fuse_attention(self.graph, targets)
        self.graph.eliminate_dead_code(_stays)
        rewritten = fx.GraphModule(self._attributes(targets), self.graph, class_name=type(self.unit).__name__)
        for path, module in rewritten.named_modules():  # outer code asks for the class of some
            if path and type(module) is nn.Module:
                module.__class__ = type(self.unit.get_submodule(path))
        return rewritten.eval()

    def _copy(self, node: fx.Node, targets: dict[str, Any]) -> None:
        module = self.modules.get(node.name)
        if module is not None and node in self.sites:
            self.values[node] = self._matmul(node, self.sites[node], targets)
            return
        if isinstance(module, Encoder):
            name = node.target.removesuffix("_post_act_fake_quantizer")
            codes = self._call(f"{name}_codes", module, (self._value(node.all_input_nodes[0]),), targets)
            self.codes[node] = codes
            self.values[node] = self._call(f"{name}_levels", Decoder(module), (codes,), targets)
            return
        if module is not None:  # a layer without a site
            self.values[node] = self._call(node.target, module, (self.codes[node.all_input_nodes[0]],), targets)
            return
        if node in self.steps:
            self._step(node, self.steps[node])
        reads_size = node.target in _SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim"))
        if reads_size and node.all_input_nodes[0] in self.codes:
            self.values[node] = self.graph.node_copy(node, self.codes.__getitem__)
        else:
            self.values[node] = self.graph.node_copy(node, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        return self.values[node]

    def _call(self, target: str, module: nn.Module, args: tuple, targets: dict[str, Any]) -> fx.Node:
        targets[target] = module
        return self.graph.create_node("call_module", target, args)

    def _step(self, node: fx.Node, operand: OperandSource) -> None:
        """Codes behind a node between a quantizer and its operand; scalars are applied behind the product."""
        before = operand.path[operand.path.index(node) - 1] if node is not operand.path[0] else operand.quantizer
        if node in operand.scalings or node.target in _CASTS:
            self.codes[node] = self.codes[before]
        else:
            self.codes[node] = self.graph.node_copy(node, lambda n: self.codes[n] if n is before else self._value(n))

    def _matmul(self, node: fx.Node, site: Site, targets: dict[str, Any]) -> fx.Node:
        operands = [operand for operand in (site.left, site.right) if operand is not None]
        codes = tuple(self.codes[o.path[-1] if o.path else o.quantizer] for o in operands)
        target = node.target if site.layer is not None else f"{node.name}_product"
        out = self._call(str(target), self.modules[node.name], codes, targets)
        for operand in operands:
            before = operand.quantizer
            for step in operand.path:
                if step in operand.scalings:
                    out = self.graph.node_copy(step, {**self.values, before: out}.__getitem__)
                before = step
        return out

    def _attributes(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        """What the graph's targets name: new modules, else the unit's own."""
        found, copied = {}, {}
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                own = targets.get(node.target)
                if own is None:
                    own = copy.deepcopy(operator.attrgetter(node.target)(self.unit), copied)
                found[node.target] = own
        return found


def _stays(node: fx.Node) -> bool:
    """Whether a node does something even if nothing reads it."""
    return node.op in ("placeholder", "output") or node.target is check_fixed


def _fuse_attention(graph: fx.Graph, targets: dict[str, Any]) -> None:
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
                targets[name] = RelativePositions(positions.target)
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
        is_function = function_name(node) == "add_decomposed_rel_pos" and len(node.args) == 6 and not node.kwargs
        if is_function and not factors and positions is None and RelativePositions.can_replace(node.target):
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
