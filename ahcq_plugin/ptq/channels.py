# SPDX-License-Identifier: Apache-2.0
"""On which axis of a unit's outputs the channels lie: found by following them through the unit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.ptq.unit_runner import UnitRunner


@torch.no_grad()
def channel_axes(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[int]:
    """Axis of the channels in every tensor that ``module(*args, **kwargs)`` returns.

    A Linear puts them last, a convolution on axis 1; permutations and reshapes behind it may move them. Outputs that no
    layer made, or whose channels are spread over several axes, get the axis of the last layer that ran.

    Args:
        module: a prepared unit, or one of its layers.
    Returns:
        One axis for each leaf of the output's structure, whatever the leaf is.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        return [_layer_axis(module)]
    follower = ChannelFollower(module)
    follower(*args, **kwargs)
    axes = [_only_axis(numbers) for numbers in follower.outputs]
    return [follower.last_axis if axis is None else axis for axis in axes]


class ChannelFollower(UnitRunner):
    """Gives every element of every tensor the number of its channel, from 1; 0: of none (padding).

    A layer numbers its output anew. What only moves elements is applied to their numbers; what computes with them
    hands on the numbers of an operand of the result's shape (residual additions, norms, activations).

    Attributes:
        numbers: of every node that is still needed: float32 numbers of its shape; None where they are not known.
        outputs: for each leaf of the unit's output float32 numbers of its shape; None where they are not known.
        last_axis: of the channels of the layer that ran last.
    """

    def __init__(self, unit: fx.GraphModule):
        super().__init__(unit)
        self._index = GraphIndex(unit, unit.graph)
        self.numbers: dict[fx.Node, Any] = {}
        self.outputs: list[Tensor | None] = []
        self.last_axis = -1

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            self.outputs = pytree.tree_leaves(map_arg(n.args[0], self.numbers.get))
            return result
        source = self._index.shape_source(n)
        if self._index.is_layer(n):
            self.last_axis = _layer_axis(self._index.module(n))
            self.numbers[n] = _number(result, self.last_axis)
        elif source is not None and self.numbers[source] is not None:
            args, kwargs = (
                map_arg(given, lambda a: self.numbers[a] if a is source else self.env[a])
                for given in (n.args, n.kwargs)
            )
            self.numbers[n] = getattr(self, n.op)(n.target, args, kwargs)
        else:
            self.numbers[n] = pytree.tree_map(lambda leaf: self._inherited(n, leaf), result)
        for used in self.user_to_last_uses.get(n, ()):
            del self.numbers[used]
        return result

    def _inherited(self, node: fx.Node, leaf: Any) -> Tensor | None:
        if not isinstance(leaf, Tensor):
            return None
        for numbers in map(self.numbers.get, node.all_input_nodes):
            if isinstance(numbers, Tensor) and numbers.shape == leaf.shape:
                return torch.empty_like(leaf, dtype=torch.float32).copy_(numbers)
        return None


def _layer_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _number(x: Tensor, axis: int) -> Tensor:
    """Numbers from 1 on along ``axis``, in the shape and memory layout of x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    numbers = torch.arange(1.0, x.shape[axis] + 1, device=x.device).view(shape)
    return torch.empty_like(x, dtype=torch.float32).copy_(numbers)


def _only_axis(numbers: Any) -> int | None:
    """The axis along which the numbers differ if there is exactly one."""
    if not isinstance(numbers, Tensor) or not numbers.numel():
        return None
    lowest = numbers.masked_fill(numbers == 0, math.inf)
    axes = [axis for axis in range(numbers.ndim) if bool((numbers.amax(axis) > lowest.amin(axis)).any())]
    return axes[0] if len(axes) == 1 else None
