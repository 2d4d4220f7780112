# SPDX-License-Identifier: Apache-2.0
"""The second pass of calibration: shows quantizers what their tensor leads to.

An observer sees only its own tensor. HLUQ, LNQ and their kin choose parameters by the error of the product behind it:
the following Linear layers, or attention weights times values. So a unit is run node by node, and each of these
products is handed to its quantizer together with the tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from ahcq_plugin.graph.ops import GraphIndex, matmul_operands
from ahcq_plugin.ptq.unit_runner import UnitRunner
from ahcq_plugin.quantizers import FakeQuantize


@dataclass(frozen=True)
class _Operand:
    """Operand of a matmul whose quantizer is to be scored; ``path`` leads from the operand back to that quantizer."""

    quantizer: FakeQuantize
    is_left: bool
    path: tuple[fx.Node, ...]


class ProductRunner(UnitRunner):
    """Runs a prepared unit and calls ``score(x, product)`` of the ``wanted`` quantizers on the way.

    A quantizer in front of Linear layers gets their products without bias; one in front of a matmul gets the product
    with the other operand, both quantizers if both are wanted; any other gets the tensor itself. Scalar factors between
    a quantizer and its matmul are left out: parameters belong to the tensor before them, and a constant factor ranks
    no candidate before another.
    """

    def __init__(self, unit: fx.GraphModule, wanted: Collection[FakeQuantize]):
        super().__init__(unit)
        self.wanted = set(wanted)
        self._index = GraphIndex(unit, unit.graph)
        self._matmuls = self._find_matmuls(unit)
        operands = [operand for of_one in self._matmuls.values() for operand in of_one]
        self._with_matmul = {operand.quantizer for operand in operands}
        self._sources = {node: source for o in operands for node, source in pairwise(o.path)}
        self._unscaled: dict[fx.Node, Any] = {}

    def _find_matmuls(self, unit: fx.GraphModule) -> dict[fx.Node, list[_Operand]]:
        """matmul -> its operands that come from wanted quantizers."""
        index, found = self._index, defaultdict(list)
        for node in filter(index.is_matmul, unit.graph.nodes):
            for is_left, (_, operand) in zip((True, False), matmul_operands(node), strict=True):
                path = index.walk_back(operand)
                quantizer = index.module(path[-1])
                if quantizer in self.wanted:
                    found[node].append(_Operand(quantizer, is_left, tuple(path)))
        return found

    def run_node(self, n: fx.Node) -> Any:
        quantizer = self.submodules.get(n.target) if n.op == "call_module" else None
        if quantizer in self.wanted and quantizer not in self._with_matmul:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            quantizer.score(x, linear_product(quantizer.consumers))
        for operand in self._matmuls.get(n, ()):
            self._score(n, operand)
        result = super().run_node(n)
        if n in self._sources:
            self._carry(n)
        for used in self.user_to_last_uses.get(n, ()):
            self._unscaled.pop(used, None)
        return result

    def _score(self, matmul: fx.Node, operand: _Operand) -> None:
        nodes = [node for _, node in matmul_operands(matmul)]
        left, right = self.map_nodes_to_values(nodes, matmul)
        if operand.is_left:
            left = self._unscaled.get(operand.path[0], left)
        else:
            right = self._unscaled.get(operand.path[0], right)
        # (L R)^T = R^T L^T: rows of the scored operand always stand on dim -2
        x, other = (left, right) if operand.is_left else (right.mT, left.mT)
        operand.quantizer.score(x, lambda rows: rows @ other)

    def _carry(self, node: fx.Node) -> None:
        """Keep what ``node`` would give without the scalar factors behind the quantizer, where it differs."""
        source = self._sources[node]
        if self._index.shape_source(node) is None:
            self._unscaled[node] = self._unscaled.get(source, self.env[source])
        elif source in self._unscaled:
            held = [
                map_arg(part, lambda n: self._unscaled[n] if n is source else self.env[n])
                for part in (node.args, node.kwargs)
            ]
            self._unscaled[node] = getattr(self, node.op)(node.target, *held)


def linear_product(layers: tuple[nn.Module, ...]) -> Callable[[Tensor], Tensor]:
    """t -> [t W^T of every layer], side by side; t itself unless all layers are Linear."""
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        return lambda t: t
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return lambda t: F.linear(t, weight.to(t.dtype))
