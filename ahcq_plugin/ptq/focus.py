# SPDX-License-Identifier: Apache-2.0
"""Perceptual-consistency clipping (SAQ-SAM): ranges of queries and keys by what attention looks at.

Outliers of queries and keys may be a hundred times the rest and still hardly matter to where attention looks. So among
the ranges of a ``PercentileObserver`` the one is taken whose attention keeps the focus of the floating-point attention
(``functional/focus.py``), however much it clips: coordinate descent over the inputs of both projections and their
outputs, with weights and everything else in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from tqdm import tqdm

from ahcq_plugin.functional.focus import focus_distance
from ahcq_plugin.functional.uniform import UniformParams, qparams_from_range
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, matmul_operands
from ahcq_plugin.ptq.prepared import activation_quantizers, intercepted, observing
from ahcq_plugin.ptq.unit_runner import UnitRunner
from ahcq_plugin.quantizers import PercentileObserver, UniformFakeQuantize
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers

#: The first so many calibration items judge; every candidate runs each attention once on all of them.
ITEMS = 4
#: How often all coordinates are gone through.
ROUNDS = 2


@dataclass(frozen=True)
class _Attention:
    """An attention with projections of its own for queries and keys.

    Attributes:
        coordinates: nodes and their quantizers to be chosen, in the order of the descent.
        cone: nodes behind one of these and before the softmax, that included, in graph order.
        border: what the cone reads from outside, besides parameters.
    """

    softmax: fx.Node
    coordinates: dict[fx.Node, UniformFakeQuantize]
    cone: tuple[fx.Node, ...]
    border: frozenset[fx.Node]


@torch.no_grad()
def clip_by_focus(
    model: nn.Module, batches: Sequence[Any], forward: Forward, progress: bool = True, workers: Workers = ALONE
) -> list[str]:
    """Choose the ranges of queries and keys, of a prepared and observed model, in place.

    Chosen are quantizers with a ``PercentileObserver`` of attentions whose queries and keys come from a Linear layer
    each (a SAM decoder's; its encoder has one layer for both): of the layers' outputs, and of their inputs unless
    another layer, of values, reads the same quantizer. Of equally good ranges the widest is taken.

    Args:
        workers: processes that share the items; their number changes no parameter.
    Returns:
        Names of the quantizers whose range was chosen.
    """
    units = prepared_units(model)
    chosen: dict[UniformFakeQuantize, UniformParams] = {}
    runners = {name: FocusRunner(unit, chosen) for name, unit in units.items()}
    turns: dict[UniformFakeQuantize, int] = {}
    for runner in runners.values():
        for quantizer, turn in runner.turns.items():
            turns[quantizer] = min(turn, turns.get(quantizer, turn))
    if not turns:
        return []
    ranges = {quantizer: quantizer.activation_post_process.ranges() for quantizer in turns}
    candidates = {q: [qparams_from_range(lo, hi, q.bits) for lo, hi in found] for q, found in ranges.items()}
    asked = [{q: candidates[q] for q in turns if turns[q] == turn} for turn in sorted(set(turns.values()))]
    items, device = [batches[item] for item in range(min(ITEMS, len(batches)))], model_device(model)
    with observing(model, []), tqdm(total=ROUNDS * len(asked), desc="focus", unit="turn", disable=not progress) as bar:
        for trials in asked * ROUNDS:
            mine = []
            for item in workers.share(len(items)):
                distances: dict[UniformFakeQuantize, Tensor] = {}
                for runner in runners.values():
                    runner.trials, runner.distances = trials, distances
                with intercepted(units, lambda name, _, args, kwargs: runners[name](*args, **kwargs)):
                    forward(model, to_device(items[item], device))
                mine.append([distances[quantizer].cpu() for quantizer in trials])
            of_items = workers.in_order(mine, len(items))
            for quantizer, errors in zip(trials, zip(*of_items, strict=True), strict=True):
                chosen[quantizer] = trials[quantizer][int(torch.stack(errors).sum(0).argmin())]
            bar.update()
    for quantizer, params in chosen.items():
        quantizer.take(params)
        quantizer.keep_valid()
    return [name for name, quantizer in activation_quantizers(model) if quantizer in chosen]


class FocusRunner(UnitRunner):
    """Runs a unit in floating point and measures how far ranges that are tried move the focus of its attentions.

    Args:
        chosen: ranges taken so far, also of other units; while one quantizer is tried the others have theirs.

    Attributes:
        turns: quantizer -> when its turn is: inputs of queries' projections, of keys', queries, keys.
        trials: candidates of the quantizers that are tried in the next run.
        distances: is given float64 (candidates,) of each of them, sums over the attentions that it serves.
    """

    def __init__(self, unit: fx.GraphModule, chosen: Mapping[UniformFakeQuantize, UniformParams]):
        super().__init__(unit)
        self._index, self._chosen = GraphIndex(unit, unit.graph), chosen
        self.turns: dict[UniformFakeQuantize, int] = {}
        self._attentions = {attention.softmax: attention for attention in self._find()}
        self._border = frozenset().union(*(attention.border for attention in self._attentions.values()))
        self._kept: dict[fx.Node, Any] = {}
        self.trials: Mapping[UniformFakeQuantize, list[UniformParams]] = {}
        self.distances: dict[UniformFakeQuantize, Tensor] = {}

    def _find(self) -> Iterator[_Attention]:
        index = self._index
        found = [(scores, sources) for scores in index.graph.nodes if (sources := self._projected(scores))]
        projections = {index.module(source) for _, sources in found for _, source in sources}
        order = {node: place for place, node in enumerate(index.graph.nodes)}
        for scores, sources in found:
            inputs = [source.all_input_nodes[0] for _, source in sources]
            kept: dict[fx.Node, UniformFakeQuantize] = {}
            for turn, node in enumerate([*inputs, *(quantizer for quantizer, _ in sources)]):
                quantizer = self._searched(node)
                if quantizer is not None and projections.issuperset(quantizer.consumers):
                    kept[node] = quantizer
                    self.turns[quantizer] = min(turn, self.turns.get(quantizer, turn))
            softmax = self._softmax_behind(scores)
            if kept and softmax is not None:
                inside = _behind(list(kept)) & _before(softmax)
                cone = tuple(sorted(inside, key=order.__getitem__))
                read = {node for inner in cone for node in inner.all_input_nodes}
                yield _Attention(softmax, kept, cone, frozenset(read - inside))

    def _searched(self, node: fx.Node) -> UniformFakeQuantize | None:
        """The quantizer that a node calls, if its range is to be chosen."""
        quantizer = self._index.module(node)
        if not isinstance(quantizer, UniformFakeQuantize):
            return None
        return quantizer if isinstance(quantizer.activation_post_process, PercentileObserver) else None

    def _projected(self, scores: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """(quantizer, projection) of queries and of keys; empty unless ``scores`` is their product, each by a Linear of
        its own."""
        index = self._index
        if not index.is_matmul(scores):
            return []
        ends = [index.walk_back(operand)[-1] for _, operand in matmul_operands(scores)]
        if [getattr(index.module(end), "role", "") for end in ends] != ["q", "k"]:
            return []
        pairs = [(end, index.walk_back(end.all_input_nodes[0])[-1]) for end in ends]
        layers = [index.module(source) for _, source in pairs]
        return pairs if all(isinstance(m, nn.Linear) for m in layers) and layers[0] is not layers[1] else []

    def _softmax_behind(self, scores: fx.Node) -> fx.Node | None:
        stack = [scores]
        while stack:
            for user in stack.pop().users:
                if self._index.is_softmax(user):
                    return user
                if not self._index.is_layer(user) and not self._index.is_matmul(user):
                    stack.append(user)
        return None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._border:
            self._kept[n] = result
        if n in self._attentions:
            self._judge(self._attentions[n], result)
        if n.op == "output":
            self._kept.clear()
        return result

    def _judge(self, attention: _Attention, reference: Tensor) -> None:
        nodes: dict[UniformFakeQuantize, list[fx.Node]] = {}
        for node, quantizer in attention.coordinates.items():
            nodes.setdefault(quantizer, []).append(node)
        for quantizer, own in nodes.items():
            if quantizer not in self.trials:
                continue
            state = {other: params for other, params in self._chosen.items() if other is not quantizer}
            start = self._cone(attention, attention.cone, {}, state)
            changing = _behind(own)
            again = [node for node in attention.cone if node in changing]
            distances = []
            for candidate in self.trials[quantizer]:
                values = self._cone(attention, again, start, {**state, quantizer: candidate})
                distances.append(focus_distance(reference, values[attention.softmax]))
            total = torch.stack(distances)
            self.distances[quantizer] = self.distances[quantizer] + total if quantizer in self.distances else total

    def _cone(
        self,
        attention: _Attention,
        nodes: Sequence[fx.Node],
        known: Mapping[fx.Node, Any],
        state: Mapping[UniformFakeQuantize, UniformParams],
    ) -> dict[fx.Node, Any]:
        """Values of the cone's nodes with the quantizers of ``state`` on; all but ``nodes`` as ``known``."""
        values = dict(known)
        for node in nodes:
            args, kwargs = (
                map_arg(part, lambda n: values[n] if n in values else self._kept[n])
                for part in (node.args, node.kwargs)
            )
            quantizer = attention.coordinates.get(node)
            if quantizer is not None and quantizer in state:
                values[node] = quantizer.quantize_with(args[0], state[quantizer])
            else:
                values[node] = getattr(self, node.op)(node.target, args, kwargs)
        return values


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything that is computed from them."""
    found, stack = set(nodes), list(nodes)
    while stack:
        fresh = [user for user in stack.pop().users if user not in found]
        found.update(fresh)
        stack.extend(fresh)
    return found


def _before(node: fx.Node) -> set[fx.Node]:
    """``node`` and everything that it is computed from."""
    found, stack = {node}, [node]
    while stack:
        fresh = [source for source in stack.pop().all_input_nodes if source not in found]
        found.update(fresh)
        stack.extend(fresh)
    return found
