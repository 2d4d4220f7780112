# SPDX-License-Identifier: Apache-2.0
"""Units whose softmax runs on integers too (``table_softmax``) from accumulators of Q K^T to codes of probabilities."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from ahcq_plugin.export.convert import activation_operand
from ahcq_plugin.export.golden import product_scale
from ahcq_plugin.export.interpret import Call, UnitInterpreter
from ahcq_plugin.export.matmul import Matmul
from ahcq_plugin.export.operands import SpecError
from ahcq_plugin.export.table_softmax import MASKED, TableSoftmax, score_bits
from ahcq_plugin.graph.ops import GraphIndex, function_name
from ahcq_plugin.graph.relative_positions import add_relative_positions

ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
#: Functions that add terms of rows and of columns to their first argument -> which arguments make the terms.
POSITIONS = {"add_decomposed_rel_pos": (2, 3), add_relative_positions.__name__: (1, 2)}
#: What may stand between softmax and its quantizer: it changes neither values nor places.
SAME_VALUES = frozenset({F.dropout, torch.dropout, "to", "type", "type_as", "float", "contiguous"})
_TOP = -MASKED - 1

#: The output of a matmul, and which one of the spec it is with its accumulators (..., m, n, 1); None: not in the spec.
Computed = tuple[Tensor, tuple[Matmul, np.ndarray] | None]


@dataclass
class SoftmaxRow:
    """How the codes of one softmax on tables compared with those of the float softmax of the same scores.

    Attributes:
        codes: how many.
        differing: that differ. further: that are more than one level apart.
        reason: why it stayed in floating point, else "".
    """

    codes: int = 0
    differing: int = 0
    further: int = 0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class SoftmaxCall:
    """One execution of a softmax on tables.

    Attributes:
        quantizer: name of the node behind it.
        step: its constants.
        scores: int64 (..., m, n).
        heads: int64 (..., m), of each row; None: all are of head 0.
        product: name of the matmul whose accumulators the scores are; "" where other terms than ``terms`` were added.
        bits: fraction bits that the accumulators got. terms: relative positions, the two terms of each score, int64
            (..., m, n), of rows and of columns; () where there are none.
    """

    quantizer: str
    step: TableSoftmax
    scores: np.ndarray
    heads: np.ndarray | None
    product: str
    bits: int = 0
    terms: tuple[np.ndarray, ...] = ()


def run_softmax(call: SoftmaxCall) -> np.ndarray:
    """int64 codes (..., m, n) of the golden step."""
    return call.step.run(call.scores, call.heads)


@dataclass(frozen=True)
class _Scores:
    """int64 integers, accumulators of the matmul ``product``, each worth ``scale[head]`` (float64); head (None: all are
    of head 0) has their shape. They are ``fine`` once they have the ``bits`` that added terms want; ``terms`` are
    relative positions, if nothing else was added."""

    integers: Tensor
    scale: np.ndarray
    head: Tensor | None
    product: str
    fine: bool = False
    bits: int = 0
    terms: tuple[Tensor, ...] = ()

    def mapped(self, move: Callable[[Tensor], Tensor]) -> _Scores:
        head, terms = None if self.head is None else move(self.head), tuple(map(move, self.terms))
        return replace(self, integers=move(self.integers), head=head, terms=terms)

    def refined(self) -> _Scores:
        bits = 0 if self.fine else score_bits(np.abs(self.scale))
        finer = dict(integers=self.integers << bits, scale=np.ldexp(self.scale, -bits), bits=self.bits + bits)
        return replace(self, **finer, fine=True, terms=())

    def units(self) -> Tensor | float:
        return float(self.scale[0]) if self.head is None else torch.from_numpy(self.scale)[self.head]


@dataclass(frozen=True)
class _Link:
    """How a node makes scores from those of ``source``."""

    source: fx.Node
    kind: str  # shape, scale or add


class TableSoftmaxInterpreter(UnitInterpreter):
    """Runs a unit; ``on_matmul(call)`` gives the output and the accumulators of each matmul, ``on_softmax(call)`` the
    codes of each softmax on tables.

    Between Q K^T and softmax scores may be reshaped, multiplied by positive numbers, and terms may be added to them:
    these are rounded to units of the scores, half to even, which get ``score_bits`` more bits for it. Relative
    positions are two terms, rounded each. Minus infinity masks; what has more than 32 bits saturates.

    Attributes:
        rows: name of the quantizer behind each softmax -> how its codes compared. What cannot run on tables stays in
            floating point and says why.
    """

    def __init__(
        self,
        unit: fx.GraphModule,
        on_matmul: Callable[[Call], Computed],
        on_softmax: Callable[[SoftmaxCall], np.ndarray] = run_softmax,
    ):
        super().__init__(unit, self._computed)
        self._compute, self._on_softmax = on_matmul, on_softmax
        self._index = GraphIndex(unit, unit.graph)
        self._links: dict[fx.Node, _Link] = {}
        self._softmaxes: dict[fx.Node, fx.Node] = {}  # of each quantizer
        self.rows: dict[str, SoftmaxRow] = {}
        self._scores: dict[fx.Node, _Scores] = {}
        self._products: dict[fx.Node, tuple[Matmul, np.ndarray, float]] = {}
        for node in dict.fromkeys(site.left.quantizer for site in self.sites.values() if site.kind == "av"):
            self.rows[node.name] = SoftmaxRow()
            try:
                self._softmaxes[node] = self._chain(node)
            except _Float as reason:
                self.rows[node.name].reason = str(reason)
        sources = [link.source for link in self._links.values()]
        self._uses = Counter([*sources, *(softmax.all_input_nodes[0] for softmax in self._softmaxes.values())])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._scores.clear()
        self._products.clear()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._softmaxes and (found := self._codes(n)) is not None:
            quantizer = self.submodules[n.target]
            assert isinstance(quantizer, nn.Module)
            self.codes[n] = found
            return quantizer.decode(found)
        result = super().run_node(n)
        if (product := self._products.pop(n, None)) is not None and self._uses[n]:
            self._scores[n] = _from_product(*product)
        elif n in self._links and (before := self._take(self._links[n].source)) is not None:
            self._scores[n] = self._linked(n, self._links[n], before)
        return result

    def _take(self, node: fx.Node) -> _Scores | None:
        """The scores of ``node``, which are freed where nobody else reads them."""
        return self._scores.get(node) if self._uses[node] > 1 else self._scores.pop(node, None)

    def _computed(self, call: Call) -> Tensor:
        output, exported = self._compute(call)
        if exported is not None and call.site.kind == "qk":
            scaling = float(call.rescale(torch.ones((), dtype=torch.float64)))
            self._products[call.site.node] = (*exported, scaling)
        return output

    def _chain(self, quantizer: fx.Node) -> fx.Node:
        """The softmax whose probabilities are quantized; keeps the links before it."""
        softmax = quantizer.all_input_nodes[0]
        while not self._index.is_softmax(softmax):
            module = self._index.module(softmax)
            if softmax.target not in SAME_VALUES and not isinstance(module, nn.Dropout | nn.Identity):
                raise _Float(f"its probabilities come from node '{softmax.name}', not from softmax")
            softmax = softmax.all_input_nodes[0]
        node = softmax.all_input_nodes[0]
        while node not in self.sites:
            self._links[node] = link = self._link(node)
            node = link.source
        if self.sites[node].kind != "qk":
            raise _Float(f"its scores come from the matmul '{node.name}', which is no product of queries and keys")
        return softmax

    def _link(self, node: fx.Node) -> _Link:
        if (source := self._index.shape_source(node)) is not None:
            return _Link(source, "shape")
        if (source := self._index.scale_source(node)) is not None:
            return _Link(source, "scale")
        operands: list[fx.Node] = []
        if node.op in ("call_function", "call_method") and node.target in ADDITIONS:
            operands = [n for n in node.args if isinstance(n, fx.Node)]
        elif function_name(node) in POSITIONS:
            operands = node.all_input_nodes[:1]
        for source in operands:
            if self._of_product(source):
                return _Link(source, "add")
        raise _Float(f"its scores come from node '{node.name}', which tables do not know")

    def _of_product(self, node: fx.Node) -> bool:
        try:
            while node not in self.sites:
                node = self._link(node).source
        except _Float:
            return False
        return self.sites[node].kind == "qk"

    def _linked(self, node: fx.Node, link: _Link, before: _Scores) -> _Scores:
        if link.kind == "shape":
            return before.mapped(self._bound(node, link.source))
        if link.kind == "scale":
            factor = float(self._bound(node, link.source)(torch.ones((), dtype=torch.float64)))
            return replace(before, scale=before.scale * factor)
        alone, before, terms = not before.fine, before.refined(), []
        total = before.integers
        for term in self._terms(node, link.source):
            if bool(term.isnan().any()):
                raise SpecError(f"node '{node.name}' adds NaN to scores; look for NaN in the model")
            rounded = (term.cpu().double() / before.units()).round().clamp(-_TOP, _TOP).long()
            masked = (total == MASKED) | (term.cpu() == -math.inf)
            total = torch.where(masked, MASKED, (total + rounded).clamp(-_TOP, _TOP))
            terms.append(rounded.expand(total.shape))
        return replace(before, integers=total, terms=tuple(terms) if alone and len(terms) == 2 else ())

    def _terms(self, node: fx.Node, source: fx.Node) -> list[Tensor]:
        """What ``node`` adds to the values of ``source``: what it gives for zeros."""
        makers = POSITIONS.get(function_name(node) or "", ())
        if not makers:
            return [self._with(node, {source})]
        tables = {at: node.args[at] for at in makers}
        return [self._with(node, {source, *(t for at, t in tables.items() if at != kept)}) for kept in makers]

    def _with(self, node: fx.Node, zeroed: set[Any]) -> Tensor:
        """The result of ``node`` with zeros for some of its inputs."""

        def held(n: fx.Node) -> Any:
            return torch.zeros_like(self.env[n]) if n in zeroed else self.env[n]

        args, kwargs = (map_arg(part, held) for part in (node.args, node.kwargs))
        return getattr(self, node.op)(node.target, args, kwargs)

    def _codes(self, quantizer: fx.Node) -> Tensor | None:
        """Codes behind the softmax of ``quantizer`` by tables; None where it stays in floating point."""
        row, softmax = self.rows[quantizer.name], self._softmaxes[quantizer]
        module, x = self.submodules[quantizer.target], self.env[quantizer.all_input_nodes[0]]
        scores = self._take(softmax.all_input_nodes[0])
        row.reason = self._problem(softmax, scores, module)
        if row.reason or scores is None:
            return None
        operand = activation_operand(module)
        heads = None if scores.head is None else scores.head[..., 0].numpy()
        step = TableSoftmax.of(scores.scale, operand)
        product = "" if scores.fine and not scores.terms else scores.product
        terms = tuple(term.numpy() for term in scores.terms)
        call = SoftmaxCall(quantizer.name, step, scores.integers.numpy(), heads, product, scores.bits, terms)
        codes = torch.from_numpy(self._on_softmax(call)).to(x.device)
        rank = torch.from_numpy(np.argsort(step.rank_codes)).to(x.device)
        apart = (rank[codes] - rank[module.encode(x).long()]).abs()
        row.codes += codes.numel()
        row.differing += int((apart > 0).sum())
        row.further += int((apart > 1).sum())
        return codes

    def _problem(self, softmax: fx.Node, scores: _Scores | None, quantizer: nn.Module) -> str:
        if scores is None:
            return "its product of queries and keys is not in the spec"
        module = self._index.module(softmax)
        given = softmax.kwargs.get("dim", (*softmax.args, None)[1])
        dim = given if module is None else getattr(module, "dim", None)
        if dim not in (-1, scores.integers.dim() - 1):
            return f"its softmax is over axis {dim}, not the last"
        if not (scores.scale > 0).all():
            return "its scores are multiplied by a number that is not positive"
        if getattr(quantizer, "scale", torch.ones(1)).numel() > 1:
            return "its quantizer has more than one scale"
        return ""


def _from_product(matmul: Matmul, accumulators: np.ndarray, scaling: float) -> _Scores:
    """Accumulators (..., m, n, 1) of Q K^T as scores; ``scaling``: the factors of its operands."""
    scale = np.atleast_1d(np.asarray(product_scale(matmul), np.float64)) * scaling
    integers = torch.from_numpy(accumulators[..., 0])
    head = None
    if len(scale) > 1:
        products = torch.arange(math.prod(integers.shape[:-2])) % len(scale)
        head = products.view(*integers.shape[:-2], 1, 1).expand(integers.shape)
    return _Scores(integers, scale, head, matmul.name)


class _Float(Exception):
    """Why a softmax stays in floating point."""
