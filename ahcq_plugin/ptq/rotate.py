# SPDX-License-Identifier: Apache-2.0
"""Rotates the heads of attentions by what their projections are multiplied with; the model's function stays.

Queries and keys are rotated alike in their projections, relative positions that queries are multiplied with too;
values in theirs, and the output projection takes it back. Which channels form a head is found by following the numbers
of the projections' channels to the matmuls.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, layer_input, matmul_operands
from ahcq_plugin.graph.positions import RELATIVE_POSITIONS, exception_of
from ahcq_plugin.graph.relative_positions import multiplies_table
from ahcq_plugin.prequant.rotation import head_rotation, rotated_rows
from ahcq_plugin.ptq.channels import ChannelFollower
from ahcq_plugin.ptq.fold import ends
from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)
#: Largest relative squared error of a unit's output that float32 rounding may make; a wrong rotation makes one near 1.
_TOLERANCE = 1e-6


@torch.no_grad()
def rotate_heads(model: nn.Module, batch: Any, forward: Forward, workers: Workers = ALONE) -> list[str]:
    """Rotate the heads of every attention of a prepared model that allows it, in place; its function stays the same.

    Left alone are attentions whose queries, keys or values are more than a Linear layer's output (normalised, rotary
    positions), or go anywhere else; queries and keys are independent of values. A unit whose output on ``batch``
    changes by more than rounding is put back, with a warning.

    Returns:
        Names of the rotated matmuls, ``<unit>.<node>``.
    """
    units, rotated, seen = prepared_units(model), [], set()

    def handler(name: str, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        out = run(*args, **kwargs)
        if name not in seen:
            seen.add(name)
            rotated.extend(f"{name}.{node}" for node in _rotate_unit(name, units[name], run, args, kwargs, out))
        return out

    with intercepted(units, handler):
        forward(model, to_device(batch, model_device(model)))
    workers.copy(p for unit in units.values() for p in read_parameters(unit))
    return rotated


def _rotate_unit(
    name: str, unit: fx.GraphModule, run: Callable[..., Any], args: tuple, kwargs: dict, wanted: Any
) -> list[str]:
    follower = _HeadFollower(unit)
    follower(*args, **kwargs)
    before = {parameter: parameter.detach().clone() for parameter in read_parameters(unit)}
    done = [node.name for node in follower.products if _rotate(follower, node)]
    error = relative_error(run(*args, **kwargs), wanted) if done else 0.0
    if error <= _TOLERANCE:
        return done
    for parameter, value in before.items():
        parameter.data.copy_(value)
    logger.warning("%s: its heads are not rotated: that would change its output by %.1e", name, error)
    return []


@dataclass(frozen=True)
class _Product:
    """A matmul of an attention, Q K^T or A V, and the nodes of its operands' quantizers by role."""

    quantizers: dict[str, fx.Node]
    values: bool


class _HeadFollower(ChannelFollower):
    """Follows the numbers of channels to the products of attentions, and behind A V on to the output projection.

    Attributes:
        products: matmul -> what it is; nothing else than Q K^T and A V.
        heads: (matmul, role) -> float32 (products, d), the numbers of the channels along the axis of a head, one row
            for each of the matmul's products; missing where they differ among tokens.
        inputs: Linear -> numbers of its input, (..., channels).
    """

    def __init__(self, unit: fx.GraphModule):
        super().__init__(unit)
        self.index = GraphIndex(unit, unit.graph)
        self.products = dict(self._find_products())
        self.heads: dict[tuple[fx.Node, str], Tensor] = {}
        self.inputs: dict[fx.Node, Tensor | None] = {}

    def _find_products(self) -> Iterator[tuple[fx.Node, _Product]]:
        for node in filter(self.index.is_matmul, self.index.graph.nodes):
            ends_of = [self.index.walk_back(operand)[-1] for _, operand in matmul_operands(node)]
            roles = {getattr(self.index.module(end), "role", ""): end for end in ends_of}
            if roles.keys() in ({"q", "k"}, {"softmax", "v"}):
                yield node, _Product(roles, "v" in roles)

    def run_node(self, n: fx.Node) -> Any:
        product = self.products.get(n)
        if product is not None:
            left, right = (self.numbers.get(operand) for _, operand in matmul_operands(n))
            # rows of tokens, columns of a head's channels
            sides = {"v": right} if product.values else {"q": left, "k": None if right is None else right.mT}
            for role, numbers in sides.items():
                if numbers is not None and bool((numbers == numbers[..., :1, :]).all()):
                    self.heads[n, role] = numbers[..., 0, :].flatten(0, -2)
        elif isinstance(self.index.module(n), nn.Linear):
            self.inputs[n] = self.numbers.get(layer_input(n)[1])
        result = super().run_node(n)
        if product is not None and product.values:
            known = (n, "v") in self.heads
            self.numbers[n] = right[..., :1, :].expand(result.shape).contiguous() if known else None
        return result

    def projection(self, node: fx.Node, role: str) -> fx.Node | None:
        """The Linear that the operand ``role`` of a product is the output of, None if something is in between."""
        source = self.index.walk_back(self.products[node].quantizers[role].args[0])[-1]
        called = [other for other in self.index.graph.nodes if other.target == source.target]
        return source if isinstance(self.index.module(source), nn.Linear) and len(called) == 1 else None

    def rows(self, node: fx.Node, role: str) -> Tensor | None:
        """int64 (heads, d) rows of the projection's weight that form a head; None where heads share some."""
        numbers = self.heads.get((node, role))
        if numbers is None or not bool((numbers > 0).all()):
            return None
        heads = numbers.long().unique(dim=0) - 1
        return heads if heads.unique().numel() == heads.numel() else None


def _rotate(follower: _HeadFollower, node: fx.Node) -> bool:
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
    if product.values and not _rotate_back(follower, node, rows["v"], rotation):
        return False
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


def _rotate_back(follower: _HeadFollower, node: fx.Node, heads: Tensor, rotation: Tensor) -> bool:
    """Let the output projection behind A V take the rotation of the values ``heads`` back; False if there is none."""
    (behind, *others) = ends(follower.index, node)
    layer, numbers = follower.index.module(behind), follower.inputs.get(behind)
    if others or not isinstance(layer, nn.Linear) or numbers is None:
        return False
    numbers = numbers.flatten(0, -2)
    called = [other for other in follower.index.graph.nodes if other.target == behind.target]
    if len(called) != 1 or not bool((numbers == numbers[:1]).all()):
        return False
    column_of = {int(number) - 1: column for column, number in enumerate(numbers[0].tolist())}
    if len(column_of) != numbers.shape[1] or not column_of.keys() <= set(heads.flatten().tolist()):
        return False
    columns = torch.tensor([[column_of.get(row, -1) for row in head] for head in heads.tolist()])
    if int(columns.min()) < 0:
        return False
    layer.weight.data.copy_(rotated_rows(layer.weight.T, columns.to(layer.weight.device), rotation).T)
    return True
