# SPDX-License-Identifier: Apache-2.0
"""Linears of a unit fitted to their quantized inputs before their rounding is learned.

Learned rounding moves a weight by at most a step. What errors of the input add to a layer's output is the same for all
rows that are alike, and a weight that may move further takes much of it away: ridge regression of the floating-point
output on the quantized input (``prequant/ridge.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.prequant.ridge import RidgeSums
from ahcq_plugin.ptq.calibrate import calibrate_weight
from ahcq_plugin.ptq.prepared import set_quantization, watched, weight_layers
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.support.workers import ALONE, Workers

Fitted = dict[nn.Linear, tuple[Tensor, Tensor | None]]


@torch.no_grad()
def refit(stream: UnitStream, name: str, strength: float, workers: Workers = ALONE) -> list[str]:
    """Fit every Linear of the collected unit ``name``, in place, and calibrate its weight's quantizer anew.

    Layers are fitted in the order of the computation, each on the input that the fitted ones before it give with
    activations quantized and weights in floating point; the target is its output in the floating-point unit. Weights
    that two layers read are left alone.

    Args:
        strength: of ``RidgeSums.solve``.
        workers: each computes all of it; the first one's result counts.
    Returns:
        Names of the fitted layers, in that order.
    """
    unit, fitted = stream.units[name], Fitted()
    layers = {layer: module for layer, module in weight_layers(unit).items() if isinstance(module, nn.Linear)}
    levels = _levels(unit, {layer: module for layer, module in layers.items() if not _is_shared(module, unit)})
    for level in levels:
        sums = {n: RidgeSums(m.in_features, m.out_features, stream.device) for n, m in level.items()}
        for sample in range(len(stream.samples)):
            set_quantization(unit, False)
            targets = _calls(stream, name, level, "floating", sample)
            set_quantization(unit, False, True)
            with _holding(fitted):
                seen = _calls(stream, name, level, "quantized", sample)
            for layer in level:
                for (x, _), (_, y) in zip(seen[layer], targets[layer], strict=True):
                    sums[layer].add(x, y)
        for layer, module in level.items():
            fitted[module] = sums[layer].solve(module.weight, module.bias, strength)
    for layer, module in ((n, m) for level in levels for n, m in level.items()):
        _put(module, fitted[module])
        workers.copy(t for t in (module.weight, module.bias) if t is not None)
        calibrate_weight(f"{name}.{layer}", module)
    return [layer for level in levels for layer in level]


def _calls(
    stream: UnitStream, name: str, layers: Mapping[str, nn.Module], kind: str, sample: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(input, output) of every call of each layer while the unit runs on a sample."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    args, kwargs = stream.inputs(kind, sample)
    with watched(layers, lambda layer, _, x, out: calls[layer].append((x, out))):
        stream.units[name](*args, **kwargs)
    return calls


@contextmanager
def _holding(fitted: Fitted) -> Iterator[None]:
    """Within the context, layers compute with their new weights and biases."""
    old = {layer: (layer.weight.clone(), None if layer.bias is None else layer.bias.clone()) for layer in fitted}
    try:
        for layer, new in fitted.items():
            _put(layer, new)
        yield
    finally:
        for layer, before in old.items():
            _put(layer, before)


def _put(layer: nn.Linear, values: tuple[Tensor, Tensor | None]) -> None:
    for tensor, value in zip((layer.weight, layer.bias), values, strict=True):
        if tensor is not None and value is not None:
            tensor.data.copy_(value)


def _levels(unit: fx.GraphModule, layers: Mapping[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """``layers`` by how many of them their inputs went through, in ascending order."""
    depth: dict[fx.Node, int] = {}
    deepest: dict[str, int] = defaultdict(int)
    for node in unit.graph.nodes:
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        is_fitted = node.op == "call_module" and node.target in layers
        depth[node] = before + is_fitted
        if is_fitted:
            deepest[node.target] = max(deepest[node.target], depth[node])
    return [{n: layers[n] for n, at in deepest.items() if at == level} for level in sorted(set(deepest.values()))]


def _is_shared(layer: nn.Module, unit: nn.Module) -> bool:
    """Whether another layer of ``unit`` reads memory of the weight of ``layer``."""

    def span(weight: Tensor) -> tuple[int, int]:
        return weight.data_ptr(), weight.data_ptr() + weight.nbytes

    start, stop = span(layer.weight)
    others = (span(other.weight) for other in weight_layers(unit).values() if other is not layer)
    return any(first < stop and start < last for first, last in others)
