# SPDX-License-Identifier: Apache-2.0
"""Takes from keys and values what all tokens share, where biases can; the model's function stays.

A constant added to all keys adds the same to all scores of a query, which softmax does not see; one added to all values
comes out as it is, since attention weights sum to 1, and goes into the bias of the output projection. What is left of
either needs a smaller range. Quantized weights do not sum to 1 exactly, and of a value near 0 that costs less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    """Make the mean of every channel of keys and values 0 over ``batches``, in place, where an attention allows it.

    Left alone are keys and values that are more than the output of a Linear layer with a bias, or go anywhere else, and
    values whose attention has no output projection with a bias. A unit whose output on the first item changes by more
    than rounding is put back, with a warning.

    Args:
        workers: the first one's means count.
    Returns:
        Names of the matmuls whose right operand is centred, ``<unit>.<node>``.
    """
    means = workers.first(_means(model, batches, forward) if workers.is_first else None)

    def change(name: str, follower: HeadFollower) -> list[str]:
        return [node.name for node in follower.products if _center(follower, node, means, name)]

    return change_units(model, batches[0], forward, "its keys and values are not centred", change, workers)


def _role(follower: HeadFollower, node: fx.Node) -> str:
    return "v" if follower.products[node].values else "k"


def _means(model: nn.Module, batches: Sequence[Any], forward: Forward) -> dict[str, Tensor]:
    """Name of the layer that gives keys or values -> float64 (channels,), mean of its output over all tokens, on the
    CPU; of layers that see some."""
    layers: dict[str, nn.Module] = {}
    for name, unit in prepared_units(model).items():
        follower = HeadFollower(unit)
        for node in follower.products:
            source = follower.projection(node, _role(follower, node))
            if source is not None:
                layers[f"{name}.{source.target}"] = follower.index.module(source)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def add(name: str, _: Any, x: Tensor, out: Tensor) -> None:
        rows = out.detach().flatten(0, -2)
        sums[name] = rows.double().sum(0) + sums.get(name, 0.0)
        counts[name] += len(rows)

    with watched(layers, add):
        for batch in batches:
            forward(model, to_device(batch, model_device(model)))
    return {name: (total / counts[name]).cpu() for name, total in sums.items() if counts[name]}


def _center(follower: HeadFollower, node: fx.Node, means: dict[str, Tensor], unit: str) -> bool:
    """Centre the right operand of one product; False if it does not allow that."""
    role = _role(follower, node)
    source, rows = follower.projection(node, role), follower.rows(node, role)
    if source is None or rows is None or f"{unit}.{source.target}" not in means:
        return False
    layer = follower.index.module(source)
    if layer.bias is None or ends(follower.index, follower.products[node].quantizers[role].args[0]) != {node}:
        return False
    rows = rows.to(layer.bias.device)
    shift = means[f"{unit}.{source.target}"].to(rows.device)[rows]
    if role == "v":
        behind = follower.behind(node, rows)
        if behind is None or behind[0].bias is None:
            return False
        output, columns = behind
        output.bias.data += (output.weight.double()[:, columns] * shift).sum((1, 2)).to(output.bias.dtype)
    layer.bias.data[rows] -= shift.to(layer.bias.dtype)
    return True
