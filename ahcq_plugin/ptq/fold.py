# SPDX-License-Identifier: Apache-2.0
"""PTQ4SAM's bimodal integration (BIG): where keys have two modes of opposite sign, make them one.

Q K^T does not change when the same channels of queries and keys change their sign. Channels whose keys lie in the
negative mode are turned over in the projections of both, so that one mode is left and the range halves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, matmul_operands
from ahcq_plugin.prequant.bimodal import fold, is_bimodal, key_signs
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)


@torch.no_grad()
def fold_bimodal_keys(model: nn.Module, batch: Any, forward: Forward, workers: Workers = ALONE) -> list[str]:
    """Fold the signs of bimodal keys into a prepared model, in place; its function stays the same.

    Looked at are attentions whose queries and keys come from a Linear layer each and go nowhere else. Whether keys are
    bimodal is judged on the first row of the batch (SAM: the first prompt) of ``batch``, as PTQ4SAM does.

    Args:
        workers: the first one judges for all, since keys near the border could fall to either side on other hardware.
    Returns:
        Names of the folded key projections.
    """
    pairs = dict(_separate_projections(model))
    projections = {name: key for name, (_, key) in pairs.items()}
    signs = workers.first(_signs_of_bimodal(model, projections, batch, forward) if workers.is_first else None)
    for name, sign in signs.items():
        query, key = pairs[name]
        tensors = (query.weight, query.bias, key.weight, key.bias)
        for tensor, folded in zip(tensors, fold(*tensors, sign.to(key.weight.device)), strict=True):
            if tensor is not None:
                tensor.copy_(folded)
        logger.info("%s: keys are bimodal, signs of %d of %d channels folded", name, int((sign < 0).sum()), len(sign))
    return list(signs)


def _signs_of_bimodal(
    model: nn.Module, projections: dict[str, nn.Linear], batch: Any, forward: Forward
) -> dict[str, Tensor]:
    """Name of the key projection -> signs of its channels, on the CPU; of those alone whose keys are bimodal."""
    keys: dict[str, Tensor] = {}
    with watched(projections, lambda name, _, x, out: keys.setdefault(name, out)):
        forward(model, to_device(batch, model_device(model)))
    return {name: key_signs(values).cpu() for name, values in keys.items() if is_bimodal(values[0])}


def _separate_projections(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Linear, nn.Linear]]]:
    """(name of the key projection, (query projection, key projection)) of every attention that has them apart."""
    for unit_name, unit in prepared_units(model).items():
        index = GraphIndex(unit, unit.graph)
        for scores in filter(index.is_matmul, unit.graph.nodes):
            sides = [
                _projection(index, operand, role, scores)
                for role, (_, operand) in zip("qk", matmul_operands(scores), strict=True)
            ]
            if None in sides or sides[0].target == sides[1].target:
                continue
            query, key = (index.module(node) for node in sides)
            if query.out_features == key.out_features:
                yield f"{unit_name}.{sides[1].target}", (query, key)


def _projection(index: GraphIndex, operand: fx.Node, role: str, scores: fx.Node) -> fx.Node | None:
    """The Linear node behind the quantizer of ``role`` that feeds ``operand``, if it feeds ``scores`` only."""
    quantizer = index.walk_back(operand)[-1]
    if getattr(index.module(quantizer), "role", "") != role:
        return None
    source = index.walk_back(quantizer.args[0], False)[-1]
    if not isinstance(index.module(source), nn.Linear):
        return None
    called = [n for n in index.graph.nodes if n.op == "call_module" and n.target == source.target]
    return source if len(called) == 1 and ends(index, source) == {scores} else None


def ends(index: GraphIndex, node: fx.Node) -> set[fx.Node]:
    """Where a tensor goes, through reshapes, scalar factors and quantizers."""
    found: set[fx.Node] = set()
    for user in node.users:
        if index.is_scalar(user):
            continue
        transparent = (
            index.shape_source(user) is not None
            or index.scale_source(user) is not None
            or isinstance(index.module(user), FakeQuantize)
        )
        found |= ends(index, user) if transparent else {user}
    return found
