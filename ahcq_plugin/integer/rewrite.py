# SPDX-License-Identifier: Apache-2.0
"""A prepared unit's graph rewritten: codes flow where fake-quantized values flowed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ahcq_plugin.export.sites import OperandSource, Site, find_sites
from ahcq_plugin.graph.fixed import CHECKS
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.unit import Unit, block_class, keep_attributes
from ahcq_plugin.integer.encoder import Decoder, Encoder
from ahcq_plugin.integer.encoding import encode_outputs
from ahcq_plugin.integer.fusing import fuse_attention, fuse_mlp, fuse_sums, reads_rows
from ahcq_plugin.integer.heads import HeadLabels, PerHeadEncoder, PerHeadProduct

_CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
_SIZES = frozenset({"size", "dim", "numel"})


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
        self.labels: dict[fx.Node, fx.Node] = {}  # of operands with parameters of their own for each head

    def run(self) -> fx.GraphModule:
        """The unit on integers; float modules and tensors in it are shared with ``unit``."""
        targets: dict[str, Any] = {}
        for node in self.unit.graph.nodes:
            self._copy(node, targets)
        self.graph.eliminate_dead_code(_stays)
        fuse_attention(self.graph, targets)
        fuse_mlp(self.graph, targets, self.unit)
        encode_outputs(self.graph, targets)
        self.graph.eliminate_dead_code(_stays)
        for node in self.graph.nodes:
            coder = targets.get(str(node.target))
            if isinstance(coder, Encoder):
                coder.rows = all(reads_rows(targets.get(str(user.target))) for user in node.users)
        fuse_sums(self.graph, targets)
        rewritten = Unit.of(self._attributes(targets), self.graph, block_class(self.unit))
        keep_attributes(self.unit, rewritten)  # outer code asks for attributes and classes
        return rewritten.eval()

    def _copy(self, node: fx.Node, targets: dict[str, Any]) -> None:
        module = self.modules.get(node.name)
        if module is not None and node in self.sites:
            self.values[node] = self._matmul(node, self.sites[node], targets)
            return
        if isinstance(module, Encoder):
            codes = self._call(f"{module.name}_codes", module, (self._value(node.all_input_nodes[0]),), targets)
            self.codes[node] = codes
            if isinstance(module, PerHeadEncoder):
                self.labels[node] = self._call(f"{module.name}_heads", HeadLabels(module), (codes,), targets)
            self.values[node] = self._call(f"{module.name}_levels", Decoder(module), (codes,), targets)
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
        for carried in (self.codes, self.labels):
            if before not in carried:
                continue
            if node in operand.scalings or node.target in _CASTS:
                carried[node] = carried[before]
            else:
                moved = {**self.values, before: carried[before]}
                carried[node] = self.graph.node_copy(node, moved.__getitem__)

    def _matmul(self, node: fx.Node, site: Site, targets: dict[str, Any]) -> fx.Node:
        operands = [operand for operand in (site.left, site.right) if operand is not None]
        ends = [o.path[-1] if o.path else o.quantizer for o in operands]
        codes: tuple[fx.Node | None, ...] = tuple(self.codes[end] for end in ends)
        if isinstance(self.modules[node.name], PerHeadProduct):
            codes += tuple(self.labels.get(end) for end in ends)
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
    return node.op in ("placeholder", "output") or node.target in CHECKS
