# SPDX-License-Identifier: Apache-2.0
"""How well a frozen model's quantizers fit what enters them: error of each, histograms of a few."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.graph import placements, prepared_units
from ahcq_plugin.ptq.prepared import watched, weight_layers
from ahcq_plugin.quantizers import FakeQuantize, UniformFakeQuantize
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.quantizers.layers import held_weight
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device

BINS = 160
# float32 counts stop growing at 2^24, and attention maps have more values than that.
_CHUNK = 2**22


@dataclass(frozen=True)
class Histogram:
    """Values that enter a quantizer, and the values that it can return.

    Attributes:
        counts: int64 (bins,); every value is counted.
        edges: float64 (bins + 1,), from the smallest to the largest of values and grid.
        grid: float64 (2^bits,), ascending: what the codes decode to.
        per_channel: values and grid are shares of their channel's range, 0 its lowest level and 1 its highest, since
            every channel has a grid of its own; ``grid`` is the median over the channels.
    """

    counts: np.ndarray
    edges: np.ndarray
    grid: np.ndarray
    per_channel: bool


@dataclass(frozen=True)
class Distribution:
    """One quantizer on one item of data; ``unit``, ``node``, ``role``, ``layers`` as in ``graph.RoleRow``.

    Attributes:
        name: of the quantizer in the model.
        values: how many entered it.
        saturated: share of them more than half a step outside the grid.
        sqnr_db: 10 log10(sum x^2 / sum (x - x_hat)^2) in dB; infinite when nothing is lost.
        shown: why it has a histogram: the ``median`` or the ``worst`` SQNR of its role (``only``: the role has one).
    """

    name: str
    unit: str
    node: str
    role: str
    layers: tuple[str, ...]
    bits: int
    values: int
    saturated: float
    sqnr_db: float
    shown: str = ""
    histogram: Histogram | None = None


@torch.no_grad()
def collect_distributions(
    model: nn.Module,
    batch: Any,
    forward: Forward | None = None,
    weights: Mapping[str, Tensor] | None = None,
    bins: int = BINS,
) -> list[Distribution]:
    """Measure every quantizer of a frozen model on one item; the model runs twice.

    What enters an activation quantizer was computed by the quantized layers before it. A quantizer that the item does
    not reach is left out (the audit reports it).

    Args:
        batch, forward: as for ``audit``.
        weights: the weights before rounding, by their names in ``model.state_dict()``. A frozen model has only the
            rounded ones: without this, weights are left out.
        bins: of the histograms; each role's quantizers with the median and with the worst SQNR have one.
    Returns:
        One row per quantizer in the order of the role table.
    Raises:
        ValueError: the model is not frozen, or ``weights`` lacks one or has it in another shape.
    """
    meters = list(_activation_meters(model))
    weight_meters = [] if weights is None else list(_weight_meters(model, weights))
    for meter in meters + [meter for meter, _ in weight_meters]:
        if not meter.quantizer.quantizing or meter.quantizer.prob != 1.0:
            raise ValueError(f"{meter.name} does not quantize everything: call `freeze` first")
    forward = forward or default_forward
    batch = to_device(batch, model_device(model))
    _run(meters, lambda: forward(model, batch), Meter.measure)
    for meter, tensors in weight_meters:
        meter.measure(*tensors)
    order = {name: i for i, name in enumerate(prepared_units(model))}
    reached = [meter for meter in meters + [meter for meter, _ in weight_meters] if meter.values]
    reached.sort(key=lambda meter: order[meter.unit])  # stable: a unit's weights come after its activations
    shown = _choose(reached)
    for meter in reached:
        if meter.name in shown:
            meter.start_counting(bins)
    _run([meter for meter in meters if meter.name in shown], lambda: forward(model, batch), Meter.count)
    for meter, tensors in weight_meters:
        if meter.name in shown:
            meter.count(*tensors)
    return [replace(meter.result(), shown=shown.get(meter.name, "")) for meter in reached]


@dataclass
class Meter:
    """Sums over what enters one quantizer."""

    name: str
    unit: str
    node: str
    role: str
    layers: tuple[str, ...]
    quantizer: FakeQuantize
    values: int = 0
    signal: float = 0.0
    noise: float = 0.0
    outside: int = 0
    lowest: float = math.inf
    highest: float = -math.inf
    grid: Tensor | None = None
    edges: np.ndarray | None = None
    counts: np.ndarray | None = None

    def measure(self, x: Tensor, x_hat: Tensor) -> None:
        """Add floats ``x`` and, in the same shape, what the quantizer makes of them."""
        if not x.numel():
            return
        if self.grid is None:
            self.grid = _grid(self.quantizer, x)
        x = x.float()
        self.values += x.numel()
        self.signal += float(x.square().sum(dtype=torch.float64))
        self.noise += float((x - x_hat.float()).square().sum(dtype=torch.float64))
        first, last = self.grid[:, 0], self.grid[:, -1]
        low = self._along_channels(first - (self.grid[:, 1] - first) / 2, x)
        high = self._along_channels(last + (last - self.grid[:, -2]) / 2, x)
        self.outside += int(((x < low) | (x > high)).sum())
        position = self._position(x)
        self.lowest = min(self.lowest, float(position.min()))
        self.highest = max(self.highest, float(position.max()))

    def start_counting(self, bins: int) -> None:
        """Fix the histogram's range from what was measured."""
        grid = self._shared_grid()
        self.edges = np.linspace(min(self.lowest, grid[0]), max(self.highest, grid[-1]), bins + 1)
        self.counts = np.zeros(bins, dtype=np.int64)

    def count(self, x: Tensor, x_hat: Tensor) -> None:
        """Add ``x`` to the histogram."""
        start, end = float(self.edges[0]), float(self.edges[-1])
        # float32 values can round to just outside of float64 ends.
        position = self._position(x.float()).clamp_(start, end).flatten()
        for part in position.split(_CHUNK):
            counted = torch.histc(part, len(self.counts), start, end)
            self.counts += counted.cpu().numpy().astype(np.int64)

    def result(self) -> Distribution:
        """The row of this quantizer."""
        histogram = None
        if self.counts is not None:
            histogram = Histogram(self.counts, self.edges, self._shared_grid(), len(self.grid) > 1)
        sqnr = math.inf
        if self.noise:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        return Distribution(
            self.name,
            self.unit,
            self.node,
            self.role,
            self.layers,
            self.quantizer.bits,
            self.values,
            self.outside / self.values,
            sqnr,
            histogram=histogram,
        )

    def _along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        if len(values) == 1:
            return values
        heads = _heads(self.quantizer)
        if heads is not None:
            index = torch.arange(x.shape[-heads.from_end], device=x.device) // heads.inner % heads.count
            return values[index].view(-1, *[1] * (heads.from_end - 1))
        return values.view([-1 if axis == self.quantizer.channel_axis(x.ndim) else 1 for axis in range(x.ndim)])

    def _position(self, x: Tensor) -> Tensor:
        """x itself, or where it lies in its channel's range."""
        if len(self.grid) == 1:
            return x.clone()
        first = self._along_channels(self.grid[:, 0], x)
        return (x - first) / (self._along_channels(self.grid[:, -1], x) - first)

    def _shared_grid(self) -> np.ndarray:
        grid = self.grid.double()
        if len(grid) > 1:
            first, last = grid[:, :1], grid[:, -1:]
            grid = ((grid - first) / (last - first)).median(0, keepdim=True).values
        return grid[0].cpu().numpy()


def _heads(quantizer: FakeQuantize) -> HeadAxis | None:
    """Where a quantizer has a grid for each head."""
    axis = quantizer.head_axis if isinstance(quantizer, UniformFakeQuantize) else HeadAxis()
    return axis if axis.count > 1 else None


def _grid(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    """float32 (channels or heads, 2^bits) ascending values of all codes; one row for a quantizer per tensor."""
    codes = torch.arange(2**quantizer.bits, device=x.device)
    heads = _heads(quantizer)
    if heads is not None:
        place = codes.view(-1, *[1] * heads.from_end).expand(
            -1, heads.count * heads.inner, *[-1] * (heads.from_end - 1)
        )
        return quantizer.decode(place).flatten(1)[:, :: heads.inner].t().sort(1).values
    axis = quantizer.channel_axis(x.ndim)
    if axis is None:
        return quantizer.decode(codes)[None].sort(1).values
    other = 1 if axis == 0 else 0
    shape = [1] * x.ndim
    shape[other] = -1
    codes = codes.view(shape)
    shape[axis] = x.shape[axis]
    decoded = quantizer.decode(codes.expand(shape))
    return decoded.movedim((axis, other), (0, 1)).reshape(x.shape[axis], -1).sort(1).values


def _activation_meters(model: nn.Module) -> Iterator[Meter]:
    for unit, traced in prepared_units(model).items():
        for placed in placements(traced):
            quantizer = traced.get_submodule(placed.quantizer_name)
            yield Meter(f"{unit}.{placed.quantizer_name}", unit, placed.node, placed.role, placed.layers, quantizer)


def _weight_meters(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[Meter, tuple[Tensor, Tensor]]]:
    """Meters with the weight before and after rounding."""
    for unit, traced in prepared_units(model).items():
        for name, layer in weight_layers(traced).items():
            key, rows = held_weight(f"{unit}.{name}", layer)
            if key not in weights:
                raise ValueError(f"`weights` lacks {key}; give the state_dict of the model before it was quantized")
            before = weights[key].to(layer.weight)[rows]
            if before.shape != layer.weight.shape:
                shapes = f"{tuple(before.shape)}, the model's {tuple(layer.weight.shape)}"
                raise ValueError(f"`weights`: {key} has shape {shapes}")
            quantizer = layer.weight_fake_quant
            meter = Meter(f"{unit}.{name}.weight_fake_quant", unit, f"{name}.weight", quantizer.role, (), quantizer)
            yield meter, (before, quantizer(layer.weight))


def _run(meters: list[Meter], forward, add) -> None:
    """Run the model with ``add(meter, input, output)`` called for every quantizer's call."""
    by_name = {meter.name: meter for meter in meters}
    with watched({m.name: m.quantizer for m in meters}, lambda name, _, x, out: add(by_name[name], x, out)):
        forward()


def _choose(meters: list[Meter]) -> dict[str, str]:
    """Name -> ``median`` | ``worst`` | ``only`` of the quantizers that stand for their role."""
    roles: dict[str, list[Distribution]] = defaultdict(list)
    for meter in meters:
        roles[meter.role].append(meter.result())
    chosen = {}
    for rows in roles.values():
        rows.sort(key=lambda row: row.sqnr_db)
        chosen[rows[len(rows) // 2].name] = "median"
        chosen[rows[0].name] = "worst" if len(rows) > 1 else "only"
    return chosen
