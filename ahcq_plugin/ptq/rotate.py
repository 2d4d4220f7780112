# SPDX-License-Identifier: Apache-2.0
"""Rotates the heads of attentions by what their projections are multiplied with; the model's function stays.

Queries and keys are rotated alike in their projections, relative positions that queries are multiplied with too;
values in theirs, and the output projection takes it back.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.positions import RELATIVE_POSITIONS, exception_of
from ahcq_plugin.graph.relative_positions import multiplies_table
from ahcq_plugin.prequant.rotation import head_rotation, rotated_rows
from ahcq_plugin.ptq.fold import ends
from ahcq_plugin.ptq.head_channels import HeadFollower, change_units
from ahcq_plugin.support.batches import Forward
from ahcq_plugin.support.workers import ALONE, Workers


@torch.no_grad()
def rotate_heads(model: nn.Module, batch: Any, forward: Forward, workers: Workers = ALONE) -> list[str]:
    """Rotate the heads of every attention of a prepared model that allows it, in place; its function stays the same.

    Left alone are attentions whose queries, keys or values are more than a Linear layer's output (normalised, rotary
    positions), or go anywhere else; queries and keys are independent of values. A unit whose output on ``batch``
    changes by more than rounding is put back, with a warning.

    Returns:
        Names of the rotated matmuls, ``<unit>.<node>``.
    """

    def change(_: str, follower: HeadFollower) -> list[str]:
        return [node.name for node in follower.products if _rotate(follower, node)]

    return change_units(model, batch, forward, "its heads are not rotated", change, workers)


def _rotate(follower: HeadFollower, node: fx.Node) -> bool:
    """Rotate the heads of one product; False if it does not allow that."""
    index, product = follower.index, follower.products[node]
    roles = ("v",) if product.values else ("q", "k")
    sources = {role: follower.projection(node, role) for role in roles}
    rows = {role: follower.rows(node, role) for role in roles}
    if None in sources.values() or any(found is None for found in rows.values()):
        return False
    tables = []
    for role in roles:
        users = ends(index, product.quantizers[role].args[0]) - {node}
        positions = {u for u in users if multiplies_table(u) or exception_of(index, u) == RELATIVE_POSITIONS}
        if users - positions or (positions and role != "q"):
            return False
        tables += [table for user in sorted(positions, key=str) for table in _tables(index, user)]
    layers: dict[Any, list[Tensor]] = defaultdict(list)
    for role in roles:
        layers[index.module(sources[role])].append(rows[role])
    size = rows[roles[0]].shape[1]
    every = [torch.cat(parts) for parts in layers.values()]
    if any(part.unique().numel() != part.numel() for part in every) or any(t.shape[-1] != size for t in tables):
        return False
    rotation = head_rotation(size)
    if product.values:
        behind = follower.behind(node, rows["v"])
        if behind is None:
            return False
        output, columns = behind  # it takes the rotation of the values back
        output.weight.data.copy_(rotated_rows(output.weight.T, columns, rotation).T)
    for layer, parts in layers.items():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.data.copy_(rotated_rows(tensor, torch.cat(parts), rotation))
    for table in tables:
        table.data.copy_(table.double() @ rotation.T.to(table.device))
    return True


def _tables(index: GraphIndex, node: fx.Node) -> list[nn.Parameter]:
    """The parameters that a product with relative positions reads."""
    if multiplies_table(node):
        return [index.module(node).weight]
    named = (n for n in index.ancestors(node, lambda n: n is not node and exception_of(index, n) is not None))
    found = [operator.attrgetter(str(n.target))(index.root) for n in named if n.op == "get_attr"]
    return [parameter for parameter in dict.fromkeys(found) if isinstance(parameter, nn.Parameter)]
