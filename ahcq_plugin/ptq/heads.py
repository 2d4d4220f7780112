# SPDX-License-Identifier: Apache-2.0
"""Finds where the heads of queries, keys and values lie, for quantizers with parameters for each head.

The channels of the projections are numbered and followed to the matmuls of the attentions: the channels that a product
reads are a head's, and a tensor in which each of them stands at known indices of one axis can have grids for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, matmul_operands
from ahcq_plugin.ptq.channels import ChannelFollower
from ahcq_plugin.ptq.prepared import intercepted, observing
from ahcq_plugin.quantizers import FakeQuantize, UniformFakeQuantize
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.support.batches import Forward, model_device, to_device


@torch.no_grad()
def lay_out_heads(model: nn.Module, batches: Sequence[Any], forward: Forward, wanted: Collection[FakeQuantize]) -> None:
    """Tell the ``wanted`` quantizers that may have parameters per head where their heads are, from a run on the first
    item; without such quantizers nothing runs.

    Those whose channels cannot be followed to the heads, or whose heads share channels, keep one set of parameters.
    """
    asked = {q for q in wanted if isinstance(q, UniformFakeQuantize) and q.per_head}
    units = {name: unit for name, unit in prepared_units(model).items() if asked.intersection(unit.modules())}
    if not units:
        return

    def handler(name: str, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        finder = _HeadFinder(units.pop(name), asked) if name in units else None
        return run(*args, **kwargs) if finder is None else finder(*args, **kwargs)

    with observing(model, []), intercepted(dict(units), handler):
        forward(model, to_device(batches[0], model_device(model)))


class _HeadFinder(ChannelFollower):
    """Lays out the quantizers ``asked`` of a unit while it runs."""

    def __init__(self, unit: fx.GraphModule, asked: Collection[UniformFakeQuantize]):
        super().__init__(unit)
        self._graph, self._asked = GraphIndex(unit, unit.graph), asked
        self._numbered: dict[UniformFakeQuantize, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if self._graph.is_matmul(n):
            left, right = (operand for _, operand in matmul_operands(n))
            self._lay_out(left, "q", lambda numbers: numbers)
            self._lay_out(right, "k", lambda numbers: numbers.mT)
            self._lay_out(right, "v", lambda numbers: numbers)
        result = super().run_node(n)
        quantizer, numbers = self._graph.module(n), self.numbers.get(n)
        if isinstance(quantizer, UniformFakeQuantize) and quantizer in self._asked and isinstance(numbers, Tensor):
            self._numbered[quantizer] = numbers
        return result

    def _lay_out(self, operand: fx.Node, role: str, rows_of: Callable[[Tensor], Tensor]) -> None:
        quantizer, numbers = self._graph.module(self._graph.walk_back(operand)[-1]), self.numbers.get(operand)
        if quantizer not in self._numbered or quantizer.role != role or not isinstance(numbers, Tensor):
            return
        rows = rows_of(numbers)
        if rows.ndim > 2 and bool((rows == rows[..., :1, :]).all()):
            found = _head_axis(self._numbered[quantizer], rows[..., 0, :].flatten(0, -2).unique(dim=0))
            quantizer.lay_out(found)


def _head_axis(numbers: Tensor, heads: Tensor) -> HeadAxis:
    """Where the heads, rows of channel numbers, lie in a tensor of such numbers; one head where that is not plain."""
    if not bool((heads > 0).all()) or heads.unique().numel() != heads.numel():
        return HeadAxis()
    head_of = torch.full((int(heads.max()) + 1,), -1, device=numbers.device)
    head_of[heads.long()] = torch.arange(len(heads), device=numbers.device)[:, None].expand(heads.shape)
    if float(numbers.max()) > float(heads.max()):
        return HeadAxis()
    labels = head_of[numbers.long()]
    for axis in range(labels.ndim):
        lines = labels.movedim(axis, 0).flatten(1)
        if bool((lines == lines[:, :1]).all()):
            return _period(lines[:, 0], labels.ndim - axis, len(heads))
    return HeadAxis()


def _period(line: Tensor, from_end: int, count: int) -> HeadAxis:
    """The layout of heads along an axis whose indices have the labels ``line``."""
    changes = (line[1:] != line[:-1]).nonzero()
    inner = int(changes[0]) + 1 if len(changes) else len(line)
    order = line[::inner][:count]
    expected = order[(torch.arange(len(line), device=line.device) // inner) % max(len(order), 1)]
    is_plain = len(order) == count > 1 and len(order.unique()) == count and torch.equal(expected, line)
    return HeadAxis(from_end, count, inner) if is_plain and bool((line >= 0).all()) else HeadAxis()
