# SPDX-License-Identifier: Apache-2.0
"""Which channels of an attention's projections form its heads, and changes of them that keep a unit's function.

Found by following the numbers of the projections' channels to the matmuls, and behind A V to the output projection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, layer_input, matmul_operands
from ahcq_plugin.ptq.channels import ChannelFollower
from ahcq_plugin.ptq.fold import ends
from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)
#: Largest relative squared error of a unit's output that float32 rounding may make; a wrong change makes one near 1.
TOLERANCE = 1e-6

#: ``change(name of a unit, its follower)`` -> names of the matmuls whose projections it changed.
Change = Callable[[str, "HeadFollower"], Sequence[str]]


@torch.no_grad()
def change_units(
    model: nn.Module, batch: Any, forward: Forward, what: str, change: Change, workers: Workers = ALONE
) -> list[str]:
    """Change every unit of a prepared model, in place, where its function stays.

    A unit whose output on ``batch`` changes by more than rounding is put back, with a warning that says that ``what``
    was not done.

    Returns:
        Names of the changed matmuls, ``<unit>.<node>``.
    """
    units, changed, seen = prepared_units(model), [], set()

    def handler(name: str, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        out = run(*args, **kwargs)
        if name in seen:
            return out
        seen.add(name)
        follower = HeadFollower(units[name])
        follower(*args, **kwargs)
        before = {parameter: parameter.detach().clone() for parameter in read_parameters(units[name])}
        done = change(name, follower)
        error = relative_error(run(*args, **kwargs), out) if done else 0.0
        if error <= TOLERANCE:
            changed.extend(f"{name}.{node}" for node in done)
            return out
        for parameter, value in before.items():
            parameter.data.copy_(value)
        logger.warning("%s: %s: that would change its output by %.1e", name, what, error)
        return out

    with intercepted(units, handler):
        forward(model, to_device(batch, model_device(model)))
    workers.copy(p for unit in units.values() for p in read_parameters(unit))
    return changed


@dataclass(frozen=True)
class Product:
    """A matmul of an attention, Q K^T or A V, and the nodes of its operands' quantizers by role."""

    quantizers: dict[str, fx.Node]
    values: bool


class HeadFollower(ChannelFollower):
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

    def _find_products(self) -> Iterator[tuple[fx.Node, Product]]:
        for node in filter(self.index.is_matmul, self.index.graph.nodes):
            ends_of = [self.index.walk_back(operand)[-1] for _, operand in matmul_operands(node)]
            roles = {getattr(self.index.module(end), "role", ""): end for end in ends_of}
            if roles.keys() in ({"q", "k"}, {"softmax", "v"}):
                yield node, Product(roles, "v" in roles)

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

    def behind(self, node: fx.Node, heads: Tensor) -> tuple[nn.Linear, Tensor] | None:
        """The output projection behind A V, and the columns (heads, d) of its weight that the values ``heads``, rows of
        theirs, come to; None where that is not all that it is."""
        found, *others = ends(self.index, node)
        layer, numbers = self.index.module(found), self.inputs.get(found)
        if others or not isinstance(layer, nn.Linear) or numbers is None:
            return None
        numbers = numbers.flatten(0, -2)
        called = [other for other in self.index.graph.nodes if other.target == found.target]
        if len(called) != 1 or not bool((numbers == numbers[:1]).all()):
            return None
        column_of = {int(number) - 1: column for column, number in enumerate(numbers[0].tolist())}
        if len(column_of) != numbers.shape[1] or not column_of.keys() <= set(heads.flatten().tolist()):
            return None
        columns = torch.tensor([[column_of.get(row, -1) for row in head] for head in heads.tolist()])
        return None if int(columns.min()) < 0 else (layer, columns.to(layer.weight.device))
