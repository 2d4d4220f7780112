# SPDX-License-Identifier: Apache-2.0
"""The AHCQ-SAM paper's pictures of what makes a model hard to quantize (figures 1, 3, 4 and 6), for any model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ahcq_plugin.graph import placements, prepared_units
from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.ptq.precondition import ConditionReport, precondition
from ahcq_plugin.ptq.prepare import prepare
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import CAGFakeQuantize, FakeQuantize, HLUQFakeQuantize, PowerOfTwoFakeQuantize
from ahcq_plugin.quantizers import UniformFakeQuantize as Uniform
from ahcq_plugin.studies.tensors import channel_ranges, sample
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device
from ahcq_plugin.support.files import replacing

SAMPLE = 20_000  # values kept of a tensor and item
LEAST_SCORE = 1e-12  # attention scores below are drawn here


@dataclass
class Tensors:
    """What entered one quantizer: a sample of all items; of each item the range of every channel of the last axis."""

    quantizer: FakeQuantize
    kind: str
    sample: list[Tensor] = field(default_factory=list)
    ranges: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in one item."""
        self.sample.append(sample(x, SAMPLE).float().cpu())
        self.ranges.append(channel_ranges(x).float().cpu())

    @property
    def values(self) -> Tensor:
        """The sample, (n,)."""
        return torch.cat(self.sample)


@torch.no_grad()
def draw(
    model: nn.Module, batches: Sequence[Any], folder: str | Path, bits: int = 4, forward: Forward | None = None
) -> dict[str, float]:
    """Prepare, precondition and calibrate ``model`` in place with the recipe ``ahcq`` and write the pictures.

    Writes ``figure1.png`` (condition numbers, values after GELU with three grids, ranges of channels, attention scores)
    and ``channels.png`` (similarity of channel parameters between items, storage of parameters).

    Returns:
        Figures drawn: ``similarity`` (mean over inputs and pairs of items), bits of parameters ``bits_per_tensor``,
        ``bits_per_channel``, ``bits_cag`` in all, ``saved`` (share that CAG saves against one set per channel),
        ``largest_cag`` (bits of one grouped input).
    """
    forward = forward or default_forward
    recipe = Recipe.from_config("ahcq", w_bits=bits, a_bits=bits)
    prepare(model, recipe)
    conditions = precondition(model, batches, recipe, forward)
    calibrate_activations(model, batches, forward)
    tensors = record(model, batches, forward)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _conditions(panels[0, 0], conditions)
    _activations(panels[0, 1], [t for t in tensors if isinstance(t.quantizer, HLUQFakeQuantize)], bits)
    channels = [t for t in tensors if isinstance(t.quantizer, CAGFakeQuantize)]
    _ranges(panels[1, 0], channels)
    _scores(panels[1, 1], [t for t in tensors if t.quantizer.role == "softmax"])
    save_figure(figure, Path(folder) / "figure1.png")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = {"similarity": _similarity(left, channels)} | _storage(right, channels, bits)
    save_figure(figure, Path(folder) / "channels.png")
    return numbers


def record(model: nn.Module, batches: Sequence[Any], forward: Forward) -> list[Tensors]:
    """What enters every quantizer of a role that the paper draws, in the model's order."""
    tensors = [
        Tensors(quantizer, kind)
        for quantizer, kind in _kinds(model)
        if quantizer.role in ("qkv_in", "mlp_in", "post_act", "softmax")
    ]
    by_quantizer = {t.quantizer: t for t in tensors}
    watch = {str(place): t.quantizer for place, t in enumerate(tensors)}
    with watched(watch, lambda _, quantizer, x, out: by_quantizer[quantizer].add(x)):
        for batch in batches:
            forward(model, to_device(batch, model_device(model)))
    return tensors


def _kinds(model: nn.Module) -> list[tuple[FakeQuantize, str]]:
    """(quantizer, name of what it belongs to): the layers that it feeds, or the attention whose scores it takes."""
    named = []
    for unit_name, unit in prepared_units(model).items():
        placed = placements(unit)
        outputs = [p for p in placed if p.role == "attn_out"]
        for placement in placed:
            layers = placement.layers
            if placement.role == "softmax":  # as many, in the same order
                position = [p for p in placed if p.role == "softmax"].index(placement)
                layers = outputs[position].layers if position < len(outputs) else ()
                attention = f"{unit_name}.{layers[0]}".split(".")[-2] if layers else unit_name
                named.append((unit.get_submodule(placement.quantizer_name), attention))
            else:
                where = f"{unit_name}.{', '.join(layers)}"
                named.append((unit.get_submodule(placement.quantizer_name), where))
    return named


def _conditions(axes: Axes, conditions: Sequence[ConditionReport]) -> None:
    axes.plot([c.before for c in conditions], "o-", markersize=3, linewidth=0.7, color="#c03030", label="before")
    axes.plot([c.after for c in conditions], "o-", markersize=3, linewidth=0.7, color="#30a050", label="after ACNR")
    axes.set(yscale="log", title="(a) condition numbers of Linear weights", xlabel="layer")
    axes.legend()


def _activations(axes: Axes, tensors: Sequence[Tensors], bits: int) -> None:
    """The first tensor after an activation, and the levels that three quantizers would have for it."""
    if not tensors:
        axes.set_title("(b) no activation function")
        return
    chosen = tensors[0]
    axes.hist(chosen.values.numpy(), bins=200, log=True, color="#9aa7b8")
    axes.set(title=f"(b) {chosen.kind}", xlabel="value", ylabel="count of the sample")
    codes = torch.arange(2**bits)
    families = (("uniform", Uniform), ("power of two", PowerOfTwoFakeQuantize), ("HLUQ", HLUQFakeQuantize))
    for height, (name, family) in zip((0.93, 0.88, 0.83), families, strict=True):
        quantizer = family(quant_max=2**bits - 1)
        for part in chosen.sample:
            quantizer.activation_post_process(part)
        quantizer.commit()
        levels = quantizer.decode(codes).numpy()
        axes.plot(levels, [height] * len(levels), "|", transform=axes.get_xaxis_transform(), markersize=9, label=name)
    axes.legend(loc="center right")


def _ranges(axes: Axes, tensors: Sequence[Tensors]) -> None:
    """The input whose channels differ most: largest range by the median one."""
    if not tensors:
        axes.set_title("(c) no grouped input")
        return

    def spread(t: Tensors) -> float:
        widths = torch.stack(t.ranges).mean(0).diff(dim=0)[0]
        return float(widths.max() / widths.median().clamp(min=1e-12))

    chosen = max(tensors, key=spread)
    lo, hi = torch.stack(chosen.ranges).mean(0)
    axes.vlines(range(len(lo)), lo, hi, linewidth=0.8, color="#4878a8")
    axes.set(title=f"(c) {chosen.kind}", xlabel="channel", ylabel="range")


def _scores(axes: Axes, tensors: Sequence[Tensors]) -> None:
    kinds: dict[str, list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault(t.kind, []).append(t.values)
    bins = torch.logspace(-12, 0, 80).tolist()
    for kind, values in kinds.items():
        scores = torch.cat(values).clamp(min=LEAST_SCORE).numpy()
        axes.hist(
            scores, bins=bins, histtype="step", density=False, weights=[1 / len(scores)] * len(scores), label=kind
        )
    axes.set(xscale="log", title="(d) attention scores", xlabel="score", ylabel="share")
    axes.legend(fontsize=8, loc="upper left")


def _similarity(axes: Axes, tensors: Sequence[Tensors]) -> float:
    """Cosine similarity of the vectors of channel ranges of two items, mean over pairs: one bar an input."""
    means = []
    for t in tensors:
        vectors = nn.functional.normalize(torch.stack([r.flatten() for r in t.ranges]), dim=1)
        products, count = vectors @ vectors.T, len(vectors)
        pairs = max(count * (count - 1), 1)
        means.append(float((products.sum() - products.trace()) / pairs) if count > 1 else 1.0)
    axes.bar(range(len(means)), means, color="#4878a8")
    axes.set(title="similarity of channel ranges between items", xlabel="input", ylabel="cosine", ylim=(0, 1.02))
    return statistics.mean(means) if means else float("nan")


def _storage(axes: Axes, tensors: Sequence[Tensors], bits: int) -> dict[str, float]:
    """Bits of scales and zero points: one set per tensor, per channel, per group."""
    one = 32 + bits
    channels = [len(t.quantizer.labels) for t in tensors]
    groups = [min(t.quantizer.groups, c) for t, c in zip(tensors, channels, strict=True)]
    totals = {"per tensor": one * len(tensors), "per channel": one * sum(channels), "CAG": one * sum(groups)}
    bars = axes.bar(list(totals), list(totals.values()), color=["#9aa7b8", "#c03030", "#30a050"])
    axes.bar_label(bars)
    axes.set(yscale="log", title="bits of parameters, all grouped inputs")
    return {
        "bits_per_tensor": totals["per tensor"],
        "bits_per_channel": totals["per channel"],
        "bits_cag": totals["CAG"],
        "saved": 1 - totals["CAG"] / max(totals["per channel"], 1),
        "largest_cag": one * max(groups, default=0),
    }


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
