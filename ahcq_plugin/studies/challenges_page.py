# SPDX-License-Identifier: Apache-2.0
"""The figures of ``studies/challenges.py`` as tables and pictures of ``docs/challenges.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ahcq_plugin.metrics.bootstrap import bootstrap_difference, bootstrap_mean
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.studies.challenges import CHALLENGES, RECONSTRUCTED, Cell, Method, read_cell, twin_of
from ahcq_plugin.studies.hardness import Spread, bimodal_attentions, statistics
from ahcq_plugin.studies.paper_figures import save_figure
from ahcq_plugin.studies.tensors import channel_ranges
from ahcq_plugin.zoo.hard import knobs
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward

GAP = "–"
SCENES = 4  # measured for the statistics and drawn
#: Knob -> (Linear whose tensor is drawn, "in" or "out", what it shows).
_DRAWN = {
    "channels": ("image_encoder.blocks.2.attn.qkv", "in", "encoder, input of qkv"),
    "offsets": (
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.v_proj",
        "in",
        "token-to-image, input of V",
    ),
    "values": ("mask_decoder.transformer.layers.1.cross_attn_token_to_image.v_proj", "out", "token-to-image, values"),
    "queries": ("mask_decoder.transformer.layers.1.cross_attn_token_to_image.q_proj", "out", "token-to-image, queries"),
    "keys": ("mask_decoder.transformer.layers.1.cross_attn_token_to_image.k_proj", "out", "token-to-image, keys"),
    "tails": ("image_encoder.blocks.2.mlp.lin2", "in", "encoder, after GELU"),
}


#: Statistic -> (the knob that raises it, what is said of SAM-B).
_SAID = {
    "channel ratio, encoder": ("channels", "pronounced, from LayerNorms (AHCQ-SAM, fig. 1 c)"),
    "channel ratio, decoder": ("offsets", "significant at token-to-image values, medians differ (the same)"),
    "channel ratio, values": ("values", "nothing"),
    "channel ratio, queries": ("queries", "queries and keys within 1, outliers from -167 to 177 (SAQ-SAM)"),
    "condition number": ("channels", "many layers excessively high, treated above 100 (AHCQ-SAM, fig. 1 a)"),
    "bimodality of keys": ("keys", "two modes in the decoder (PTQ4SAM)"),
    "distance of keys' modes": ("keys", "near 8 (PTQ4SAM, by second hand)"),
    "reach after activations": ("tails", "long-tailed, sparse values up to 0.8 (AHCQ-SAM, fig. 1 b)"),
    "share in [-0.2, 0] after GELU": ("tails", "over 0.9 (the same)"),
}


def statistics_table() -> str:
    """Markdown: every figure of ``statistics``, of ``sam_tiny``, with its challenge alone, and with all of them."""
    items = list(_items())
    found = {name: statistics(twin_of(name), items, box_forward) for name in CHALLENGES}
    bimodal = {n: bimodal_attentions(twin_of(n), items[0], box_forward) for n in ("none", "keys", "all")}
    lines = _head("median over layers (largest)", ("sam_tiny", "knob", "alone", "all", "said of SAM-B"))
    for figure, (knob, said) in _SAID.items():
        before, alone, every = (_spread(found[name][figure]) for name in ("none", knob, "all"))
        lines.append(f"| {figure} | {before} | {knob} | {alone} | {every} | {said} |")
    counts = [f"{len(names)} of 7" for names in (bimodal["none"], bimodal["keys"], bimodal["all"])]
    lines.append(
        f"| attentions whose keys BIG folds | {counts[0]} | keys | {counts[1]} | {counts[2]} | mostly decoder |"
    )
    return "\n".join(lines)


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.largest:.2f})"


def _measured(folder: Path, methods: Sequence[Method]) -> list[str]:
    """Challenges that any of the methods has figures of."""
    return [c for c in CHALLENGES if any(read_cell(folder, Cell(c, m)) is not None for m in methods)]


def overlap_table(folder: Path, methods: Sequence[Method]) -> str:
    """Markdown: mean IoU to the floating-point masks with its 95 % interval, a row a method, a column a challenge."""
    challenges = _measured(folder, methods)
    lines = _head("method", challenges)
    for method in methods:
        found = [read_cell(folder, Cell(challenge, method)) for challenge in challenges]
        cells = [GAP if iou is None else bootstrap_mean(iou).text("{:.3f}") for iou in found]
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(folder: Path, methods: Sequence[Method], base: Method) -> str:
    """Markdown: what each method gains over ``base`` on the same objects; bold where the interval excludes 0."""
    challenges = _measured(folder, methods)
    lines = _head(f"less {base.label}", challenges)
    for method in methods:
        cells = []
        for challenge in challenges:
            pair = [read_cell(folder, Cell(challenge, m)) for m in (method, base)]
            cells.append(GAP if None in pair else _difference(*pair))
        if method is not base:
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(first: list[list[float]], second: list[list[float]]) -> str:
    found = bootstrap_difference(first, second)
    return f"**{found.text('{:+.3f}')}**" if found.excludes_zero else found.text("{:+.3f}")


def _head(first: str, names: Sequence[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]


def draw_overlaps(folder: Path, methods: Sequence[Method], path: Path) -> bool:
    """A panel a challenge with a dot and its 95 % interval a method, as PNG; False without any figures."""
    found = {c: {m.label: read_cell(folder, Cell(c, m)) for m in methods} for c in CHALLENGES}
    if not any(iou is not None for row in found.values() for iou in row.values()):
        return False
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    labels = [method.label for method in methods]
    for axes, (challenge, row) in zip(figure.subplots(2, 4, sharey=True, sharex=True).flat, found.items(), strict=True):
        for place, label in enumerate(labels):
            if row[label] is not None:
                interval = bootstrap_mean(row[label])
                sides = [[interval.mean - interval.low], [interval.high - interval.mean]]
                axes.errorbar(interval.mean, place, xerr=sides, fmt="o", color="#4878a8", capsize=3)
        axes.set(title=challenge, xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), xlabel="IoU to floating point")
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x", linewidth=0.4)
    save_figure(figure, path)
    return True


def draw_tensors(path: Path) -> None:
    """For each knob the tensor that it changes, before and after: ranges of channels, of keys and after GELU counts."""
    figure = Figure(figsize=(13, 3.6 * 2), layout="constrained")
    items = list(_items())
    before = _tensors(twin_of("none"), items)
    for axes, knob in zip(figure.subplots(2, 3).flat, knobs(), strict=True):
        after = _tensors(twin_of(knob), items)
        draw = _counts if knob in ("keys", "tails") else _channels
        for tensors, label, color in ((after, "planted", "#c03030"), (before, "sam_tiny", "#4878a8")):
            draw(axes, tensors[knob], label, color)
        axes.set_title(f"{knob}: {_DRAWN[knob][2]}", fontsize=10)
        axes.legend(fontsize=8)
    save_figure(figure, path)


@torch.no_grad()
def _tensors(sam: nn.Module, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Knob -> rows of the tensor that it is drawn on."""
    found: dict[str, list[Tensor]] = {}
    layers = {knob: sam.get_submodule(name) for knob, (name, _, _) in _DRAWN.items()}

    def keep(knob: str, _: nn.Module, x: Tensor, out: Tensor) -> None:
        rows = x if _DRAWN[knob][1] == "in" else out
        found.setdefault(knob, []).append(rows.flatten(0, -2)[::7])

    with watched(layers, keep):
        for item in items:
            box_forward(sam, item)
    return {knob: torch.cat(rows) for knob, rows in found.items()}


def _channels(axes: Axes, rows: Tensor, label: str, color: str) -> None:
    low, high = channel_ranges(rows)
    axes.vlines(range(len(low)), low, high, linewidth=0.9, color=color, label=label)
    axes.set(xlabel="channel", ylabel="range", yscale="symlog")


def _counts(axes: Axes, rows: Tensor, label: str, color: str) -> None:
    axes.hist(rows.flatten().numpy(), bins=200, histtype="step", log=True, color=color, label=label)
    axes.set(xlabel="value", ylabel="count")


def _items() -> Iterator[dict[str, Tensor]]:
    sam = twin_of("none")
    return (make_batch(sam, item.image, item.boxes[:8]) for item in islice(scene_items(), SCENES))


def page(folder: Path, methods: Sequence[Method]) -> str:
    """What stands between the markers of the page; the pictures go into ``folder``."""
    base = methods[0]
    draw_tensors(folder / "tensors.png")
    parts = ["### What is planted, measured", statistics_table(), f"![Tensors]({folder.name}/tensors.png)"]
    parts += ["### IoU to the floating-point masks, W4A4, calibrated alone", overlap_table(folder, methods)]
    if draw_overlaps(folder, methods, folder / "overlaps.png"):
        parts.append(f"![IoU by challenge and method]({folder.name}/overlaps.png)")
    parts += [f"### Gain over {base.label}, paired", difference_table(folder, methods, base)]
    if _measured(folder, RECONSTRUCTED):
        parts += ["### Reconstructed, W4A4", overlap_table(folder, RECONSTRUCTED)]
        parts += [difference_table(folder, RECONSTRUCTED, RECONSTRUCTED[0])]
    return "\n\n".join(parts)
