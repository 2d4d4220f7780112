# SPDX-License-Identifier: Apache-2.0
"""Diagrams of the report as PNG, narrow enough for a phone; names and figures stand in the page's text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ahcq_plugin.ptq.distributions import Histogram

BLUE, LIGHT_BLUE, ORANGE, GREY, PALE = "#0072b2", "#7fb8dc", "#d55e00", "#5f6670", "#b9c3cf"
_DPI = 150


def unit_errors(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> bytes:
    """Two bars a unit, on a logarithmic axis; an error of 0 has no bar."""
    figure, axes = _figure(5.2, 0.75 + 0.38 * len(names))
    rows = np.arange(len(names))
    axes.barh(rows - 0.02, before, height=0.22, color=PALE, label="round to nearest")
    axes.barh(rows + 0.22, after, height=0.22, color=BLUE, label="after reconstruction")
    positive = [value for value in [*before, *after] if 0 < value < math.inf] or [1.0]
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(positive)) - 0.05), max(positive) * 1.3)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_yticks([])
    for row, name in enumerate(names):
        axes.annotate(
            name, (0, row - 0.19), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7,
            color=GREY, va="bottom",
        )  # fmt: skip
    axes.grid(axis="x", linewidth=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_xlabel("relative squared error of the unit's output", fontsize=8, color=GREY)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def condition_numbers(before: Sequence[float], after: Sequence[float]) -> bytes:
    """A column of two dots a layer, in the model's order, on a logarithmic axis; infinite ones at the upper edge."""
    figure, axes = _figure(5.2, 2.6)
    finite = [value for value in [*before, *after] if math.isfinite(value)] or [1.0]
    top = max(finite) * 2
    columns = np.arange(len(before))
    heights = [np.minimum(values, top) for values in (before, after)]
    axes.vlines(columns, heights[1], heights[0], color=PALE, linewidth=1)
    axes.plot(columns, heights[0], "o", markersize=3, color=ORANGE, label="before")
    axes.plot(columns, heights[1], "o", markersize=3, color=BLUE, label="after")
    axes.set_yscale("log")
    axes.set_ylim(min(finite) / 1.5, top * 1.2)
    axes.set_xticks([])
    axes.set_ylabel("condition number", fontsize=8, color=GREY)
    axes.grid(axis="y", linewidth=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def sqnr_bars(values: Sequence[float], limits: tuple[float, float]) -> bytes:
    """One bar a quantizer, in the model's order, the lowest in orange.

    Args:
        values: dB; infinite ones reach the upper limit.
        limits: of the axis, dB.
    """
    figure, axes = _figure(4.2, 1.5)
    worst = int(np.argmin(values))
    colours = [ORANGE if index == worst else BLUE for index in range(len(values))]
    axes.bar(range(len(values)), np.clip(values, *limits), width=0.85, color=colours)
    axes.set_ylim(*limits)
    axes.set_xlim(-0.6, max(len(values), 8) - 0.4)
    axes.set_xticks([])
    axes.set_ylabel("dB", fontsize=8, color=GREY)
    axes.grid(axis="y", linewidth=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    return _png(figure)


def histogram(data: Histogram) -> bytes:
    """Share of the values per bin (logarithmic), the grid as lines, what lies outside the grid shaded."""
    figure, axes = _figure(4.2, 1.9)
    share = data.counts / data.counts.sum()
    floor = share[share > 0].min() / 2
    axes.stairs(np.maximum(share, floor), data.edges, baseline=floor, fill=True, color=LIGHT_BLUE)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(floor, 1.6)
    margin = 0.01 * (data.edges[-1] - data.edges[0])
    low, high = data.edges[0] - margin, data.edges[-1] + margin
    axes.set_xlim(low, high)
    for start, end in ((low, data.grid[0]), (data.grid[-1], high)):
        axes.axvspan(start, end, color=GREY, alpha=0.16, linewidth=0)
    few = len(data.grid) <= 32  # more lines would hide the histogram: ticks on top instead
    axes.vlines(
        data.grid, 0 if few else 0.94, 1, transform=axes.get_xaxis_transform(), color=ORANGE,
        linewidth=0.9 if few else 0.5,
    )  # fmt: skip
    axes.set_xlabel("share of the channel's range" if data.per_channel else "value", fontsize=8, color=GREY)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Size in inches. A Figure of its own: pyplot would keep global state."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(labelsize=7.5, colors=GREY, which="both", length=2)
    return figure, axes


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
