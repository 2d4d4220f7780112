# SPDX-License-Identifier: Apache-2.0
"""Products of pairs of channels with complex constants (rotary positions) by real numbers: ONNX has no complex ones."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

_PRODUCTS = (operator.mul, torch.mul, "mul")


class ConstantRotation(nn.Module):
    """``view_as_real(view_as_complex(pairs) * factors)``, to rounding.

    Args:
        factors: complex, broadcasts against the pairs.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, factors: Tensor):
        super().__init__()
        self.register_buffer("cosines", factors.real.contiguous())
        self.register_buffer("sines", factors.imag.contiguous())

    def forward(self, pairs: Tensor) -> Tensor:
        """(..., 2) floats -> the same shape."""
        even, odd = pairs[..., 0], pairs[..., 1]
        return torch.stack((even * self.cosines - odd * self.sines, even * self.sines + odd * self.cosines), -1)


def turn_by_real_numbers(unit: fx.GraphModule) -> None:
    """Replace every product of a tensor, seen as complex, with a constant, in place; sizes are asked of real parts."""
    for node in list(unit.graph.nodes):
        parts = _parts(unit, node)
        if parts is None:
            continue
        pairs, factors = parts
        name = f"{node.name}_by_reals"
        unit.add_submodule(name, ConstantRotation(factors))
        with unit.graph.inserting_before(node):
            node.replace_all_uses_with(unit.graph.call_module(name, (pairs.args[0],)))
        product = node.args[0]
        for old in (node, product, *product.args):
            if not old.users:
                unit.graph.erase_node(old)
        if pairs.users:
            with unit.graph.inserting_before(pairs):
                pairs.replace_all_uses_with(unit.graph.call_function(torch.select, (pairs.args[0], -1, 0)))
            unit.graph.erase_node(pairs)
    unit.recompile()


def _parts(unit: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """(node that sees a tensor as complex, constant) whose product ``node`` gives as real; None for any other node."""
    product = node.args[0] if node.target is torch.view_as_real else None
    if not isinstance(product, fx.Node) or product.target not in _PRODUCTS or product.kwargs:
        return None
    if len(product.users) != 1:
        return None
    for pairs, factors in (product.args, product.args[::-1]):
        of_complex = isinstance(pairs, fx.Node) and pairs.target is torch.view_as_complex
        if of_complex and isinstance(factors, fx.Node) and factors.op == "get_attr":
            return pairs, operator.attrgetter(str(factors.target))(unit)
    return None
