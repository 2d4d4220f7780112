# SPDX-License-Identifier: Apache-2.0
"""What makes a Sam hard to quantize, as one figure a challenge: what the knobs of ``zoo/hard.py`` raise."""

from __future__ import annotations

import statistics as of_numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.prequant.bimodal import is_bimodal
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.studies.tensors import channel_ranges, condition_numbers, sample
from ahcq_plugin.support.batches import Forward, model_device, to_device

SAMPLE = 20_000  # values kept of a tensor and item


@dataclass(frozen=True)
class Spread:
    """One figure over the layers that have it."""

    median: float
    largest: float


@torch.no_grad()
def statistics(model: nn.Module, items: Sequence[Any], forward: Forward) -> dict[str, Spread]:
    """The figures, in the order of the challenges:

    ``channel ratio, ...``: range of all channels of a tensor together by the median range of one, of inputs of the
    encoder's and of the decoder's q, k, v and first MLP layers, of values and of queries: what one range for the tensor
    costs its ordinary channels. ``condition number``: of the encoder's qkv and lin1 weights. ``bimodality of keys``:
    ``bimodality`` of the decoder's keys; ``distance of keys' modes``: mean size of their channels' middles. ``reach
    after activations``: largest size by its 99th percentile; ``share in [-0.2, 0] after GELU``: of all values.

    Args: items, forward: the model is run on each item.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inputs = {name: layer for name, layer in linears.items() if name.endswith(_INPUTS)}
    behind = {name: layer for name, layer in linears.items() if name.endswith("mlp.lin2")}
    ranges: dict[str, list[Tensor]] = {}
    keys: dict[str, list[Tensor]] = {}
    hidden: dict[str, list[Tensor]] = {}

    def note_input(name: str, layer: nn.Linear, x: Tensor, out: Tensor) -> None:
        part = name.split(".")[0].removeprefix("image_").removeprefix("mask_")
        ranges.setdefault(f"{part} {name}", []).append(channel_ranges(x))
        for role, values in _projected(name, out).items():
            ranges.setdefault(f"{role} {name}", []).append(channel_ranges(values))
            if role == "keys" and part == "decoder":
                keys.setdefault(name, []).append(sample(values, SAMPLE))

    with watched(inputs, note_input), watched(behind, lambda name, _, x, out: _keep(hidden, name, x)):
        for item in items:
            forward(model, to_device(item, model_device(model)))
    figures = {f"channel ratio, {title}": _ratios(ranges, mark) for mark, title in _TITLES.items()}
    conditions = condition_numbers(model.image_encoder)
    figures["condition number"] = [c for name, c in conditions.items() if name.endswith(("qkv", "lin1"))]
    figures["bimodality of keys"] = [bimodality(torch.cat(parts)) for parts in keys.values()]
    middles = [
        torch.stack(found).mean((0, 1)) for name, found in ranges.items() if name.startswith("keys mask_decoder")
    ]
    figures["distance of keys' modes"] = [float(middle.abs().mean()) for middle in middles]
    figures["reach after activations"] = [_reach(torch.cat(parts)) for parts in hidden.values()]
    gelu = [torch.cat(parts) for name, parts in hidden.items() if name.startswith("image_encoder")]
    figures["share in [-0.2, 0] after GELU"] = [float(((x >= -0.2) & (x <= 0)).float().mean()) for x in gelu]
    return {name: Spread(of_numbers.median(values), max(values)) for name, values in figures.items()}


def bimodality(values: Tensor) -> float:
    """Sarle's coefficient, (skewness² + 1) / kurtosis: 5/9 of a uniform, 1/3 of a normal distribution, 1 of two
    points; 0 of equal values."""
    x = values.double() - values.double().mean()
    variance = float(x.square().mean())
    if not variance:
        return 0.0
    skewness, kurtosis = float((x**3).mean()) / variance**1.5, float((x**4).mean()) / variance**2
    return (skewness**2 + 1) / kurtosis


@torch.no_grad()
def bimodal_attentions(model: nn.Module, item: Any, forward: Forward) -> list[str]:
    """Names of the decoder's key projections whose keys of the first prompt PTQ4SAM's detector finds bimodal."""
    layers = {n: m for n, m in model.named_modules() if n.startswith("mask_decoder") and n.endswith("k_proj")}
    found: list[str] = []
    with watched(layers, lambda name, _, x, out: found.append(name) if is_bimodal(out[0]) else None):
        forward(model, to_device(item, model_device(model)))
    return found


_INPUTS = ("attn.qkv", "mlp.lin1", "q_proj", "k_proj", "v_proj")
_TITLES = {"encoder": "encoder", "decoder": "decoder", "values": "values", "queries": "queries"}


def _projected(name: str, out: Tensor) -> dict[str, Tensor]:
    """What a Linear makes of queries, keys and values, by role."""
    if name.endswith("attn.qkv"):
        return dict(zip(("queries", "keys", "values"), out.chunk(3, -1), strict=True))
    roles = {"q_proj": "queries", "k_proj": "keys", "v_proj": "values"}
    last = name.rsplit(".", 1)[-1]
    return {roles[last]: out} if last in roles else {}


def _keep(hidden: dict[str, list[Tensor]], name: str, x: Tensor) -> None:
    hidden.setdefault(name, []).append(sample(x.flatten(0, -2).T, SAMPLE))  # channel by channel: none is missed


def _ratios(ranges: Mapping[str, Sequence[Tensor]], mark: str) -> list[float]:
    ratios = []
    for name, found in ranges.items():
        if name.startswith(f"{mark} "):
            low, high = torch.stack(list(found)).mean(0)
            ratios.append(float((high.max() - low.min()) / (high - low).median().clamp(min=1e-12)))
    return ratios


def _reach(values: Tensor) -> float:
    size = values.abs().double()
    return float(size.max() / torch.quantile(size[:: max(1, len(size) // 1_000_000)], 0.99).clamp(min=1e-12))
