# SPDX-License-Identifier: Apache-2.0
"""Takes from keys and values what all tokens share, where biases can; the model's function stays.

A constant added to all keys adds the same to all scores of a query, which softmax does not see; one added to all values
comes out as it is, since attention weights sum to 1, and goes into the bias of the output projection. With the middle
of each channel's range at 0 the range of all channels together is that of the widest, never wider than before.
Quantized attention weights do not sum to 1 exactly, and of values near 0 that costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.fold import ends
from ahcq_plugin.ptq.head_channels import HeadFollower, change_units
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers


@torch.no_grad()
def center_heads(model: nn.Module, batches: Sequence[Any], forward: Forward, workers: Workers = ALONE) -> list[str]:
    """Put the middle of each channel's range over ``batches`` at 0, of keys and values, in place, where an attention
    allows it.

    Left alone are keys and values that are more than the output of a Linear layer with a bias, or go anywhere else, and
    values whose attention has no output projection with a bias. A unit whose output on the first item changes by more
    than rounding is put back, with a warning.

    Args:
        workers: the first one's ranges count.
    Returns:
        Names of the matmuls whose right operand is centred, ``<unit>.<node>``.
    """
    middles = workers.first(_middles(model, batches, forward) if workers.is_first else None)

    def change(name: str, follower: HeadFollower) -> list[str]:
        return [node.name for node in follower.products if _center(follower, node, middles, name)]

    return change_units(model, batches[0], forward, "its keys and values are not centred", change, workers)


def _role(follower: HeadFollower, node: fx.Node) -> str:
    return "v" if follower.products[node].values else "k"


def _middles(model: nn.Module, batches: Sequence[Any], forward: Forward) -> dict[str, Tensor]:
    """``channel_middles`` of what the layers give that give keys or values."""
    layers: dict[str, nn.Module] = {}
    for name, unit in prepared_units(model).items():
        follower = HeadFollower(unit)
        for node in follower.products:
            source = follower.projection(node, _role(follower, node))
            if source is not None:
                layers[f"{name}.{source.target}"] = follower.index.module(source)
    return channel_middles(model, layers, batches, forward, lambda x, out: out)


def channel_middles(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    forward: Forward,
    tensor: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Name of a layer -> float64 (channels,), the mean of the least and the largest value over all tokens of
    ``tensor(input, output)``, on the CPU; of layers that see some. Without layers nothing runs."""
    if not layers:
        return {}
    least: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}

    def widen(name: str, _: Any, x: Tensor, out: Tensor) -> None:
        rows = tensor(x, out).detach().flatten(0, -2)
        if len(rows):
            low, high = rows.aminmax(dim=0)
            least[name] = torch.minimum(low, least.get(name, low))
            largest[name] = torch.maximum(high, largest.get(name, high))

    with watched(layers, widen):
        for batch in batches:
            forward(model, to_device(batch, model_device(model)))
    return {name: ((least[name].double() + largest[name].double()) / 2).cpu() for name in least}


def _center(follower: HeadFollower, node: fx.Node, middles: dict[str, Tensor], unit: str) -> bool:
    """Centre the right operand of one product; False if it does not allow that."""
    role = _role(follower, node)
    source, rows = follower.projection(node, role), follower.rows(node, role)
    if source is None or rows is None or f"{unit}.{source.target}" not in middles:
        return False
    layer = follower.index.module(source)
    if layer.bias is None or ends(follower.index, follower.products[node].quantizers[role].args[0]) != {node}:
        return False
    rows = rows.to(layer.bias.device)
    shift = middles[f"{unit}.{source.target}"].to(rows.device)[rows]
    if role == "v":
        behind = follower.behind(node, rows)
        if behind is None or behind[0].bias is None:
            return False
        output, columns = behind
        output.bias.data += (output.weight.double()[:, columns] * shift).sum((1, 2)).to(output.bias.dtype)
    layer.bias.data[rows] -= shift.to(layer.bias.dtype)
    return True
