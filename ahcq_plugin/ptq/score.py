# SPDX-License-Identifier: Apache-2.0
"""The second pass of calibration: shows quantizers what their tensor leads to.

An observer sees only its own tensor. HLUQ, LNQ and their kin choose parameters by the error of the product behind it:
the following Linear layers, or attention weights times values. So a unit is run node by node, and each of these
products is handed to its quantizer together with the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.ops import GraphIndex, matmul_operands
from ahcq_plugin.ptq.unit_runner import UnitRunner
from ahcq_plugin.quantizers import FakeQuantize


class ProductRunner(UnitRunner):
    """Runs a prepared unit and calls ``score(x, product)`` of the ``wanted`` quantizers on the way.

    A quantizer in front of Linear layers gets their products without bias; one in front of a matmul gets the product
    with the other operand; any other gets the tensor itself.
    """

    def __init__(self, unit: fx.GraphModule, wanted: Collection[FakeQuantize]):
        super().__init__(unit)
        self.wanted = set(wanted)
        self._matmuls = self._find_matmuls(unit)
        self._with_matmul = {quantizer for quantizer, _ in self._matmuls.values()}

    def _find_matmuls(self, unit: fx.GraphModule) -> dict[fx.Node, tuple[FakeQuantize, bool]]:
        """matmul -> (the wanted quantizer of one of its operands, whether that is the left one)."""
        index = GraphIndex(unit, unit.graph)
        scored = {}
        for node in filter(index.is_matmul, unit.graph.nodes):
            for is_left, (_, operand) in zip((True, False), matmul_operands(node), strict=True):
                quantizer = index.module(index.walk_back(operand)[-1])
                if quantizer in self.wanted:
                    scored[node] = (quantizer, is_left)
        return scored

    def run_node(self, n: fx.Node) -> Any:
        quantizer = self.submodules.get(n.target) if n.op == "call_module" else None
        if quantizer in self.wanted and quantizer not in self._with_matmul:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            quantizer.score(x, linear_product(quantizer.consumers))
        elif n in self._matmuls:
            scored, is_left = self._matmuls[n]
            args, _ = self.fetch_args_kwargs_from_env(n)
            left, right = (args[position] for position, _ in matmul_operands(n))
            # (L R)^T = R^T L^T: rows of the scored operand always stand on dim -2
            x, other = (left, right) if is_left else (right.mT, left.mT)
            scored.score(x, lambda rows: rows @ other)
        return super().run_node(n)


def linear_product(layers: tuple[nn.Module, ...]) -> Callable[[Tensor], Tensor]:
    """t -> [t W^T of every layer], side by side; t itself unless all layers are Linear."""
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        return lambda t: t
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return lambda t: F.linear(t, weight.to(t.dtype))
