# SPDX-License-Identifier: Apache-2.0
"""The tables of ``studies/results_suites.py`` as Markdown and charts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ahcq_plugin.mm.quantization_loop import STAGES
from ahcq_plugin.studies.results import Cell, read_cell
from ahcq_plugin.studies.results_suites import COLUMNS, Columns, Row, Suite, Table
from ahcq_plugin.support.files import replacing, write_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
GAP = "–"
QUANTIZING = tuple(name for name in STAGES if name not in ("detect", "fp_eval", "quantized_eval"))


@dataclass(frozen=True)
class Figures:
    """Metrics of a row's runs that are there."""

    row: Row
    runs: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """``key`` of every run that has it."""
        return [run["quantized"][key] for run in self.runs if key in run["quantized"]]

    def text(self, key: str, form: str) -> str:
        """Mean, and standard deviation over the seeds where there are several."""
        values = self.values(key)
        if not values:
            return GAP
        mean = form.format(statistics.mean(values))
        return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"

    def limits(self, key: str) -> str:
        """The limits of ``key``, mean over the seeds, which saw the same images; empty where no run has them."""
        sides = [self.values(f"{key}_{side}") for side in ("low", "high")]
        return "–".join(f"{statistics.mean(side):.3f}" for side in sides) if all(sides) else ""


def collect(config: str, folder: Path, rows: Sequence[Row]) -> list[Figures]:
    """The stored figures of ``rows``."""
    stored = [Figures(row, [read_cell(folder, config, cell) for cell in row.cells()]) for row in rows]
    return [replace(figures, runs=[run for run in figures.runs if run is not None]) for figures in stored]


def markdown(config: str, folder: Path, rows: Sequence[Row], gaps: bool = True, columns: Columns = COLUMNS) -> str:
    """A table; a row without figures is one of gaps, or is left out. A column has the 95 % limits of the last figure by
    bootstrap over images, where runs have them."""
    figures = [row for row in collect(config, folder, rows) if gaps or row.runs]
    limited = any(row.limits(columns[-1][1]) for row in figures)
    titles = [title for title, _, _ in columns] + ["95 %"] * limited
    lines = ["| | bits | " + " | ".join(titles) + " | seeds | seconds | peak MB |", "|---" * (len(titles) + 5) + "|"]
    floating = next((run["fp"] for row in figures for run in row.runs), None)
    if floating is not None:
        cells = [form.format(floating[key]) if key in floating else GAP for _, key, form in columns]
        lines.append("| floating point | 32 | " + " | ".join([*cells, *[GAP] * limited, GAP, GAP, GAP]) + " |")
    for row in figures:
        cells = [row.text(key, form) for _, key, form in columns]
        cells += [row.limits(columns[-1][1]) or GAP] * limited
        seconds, peak = _costs(row.runs)
        bits = f"W{row.row.cell.bits}A{row.row.cell.bits}"
        seeds = str(len(row.runs)) if row.runs else GAP
        lines.append(f"| {row.row.label} | {bits} | " + " | ".join([*cells, seeds, seconds, peak]) + " |")
    return "\n".join(lines)


def _costs(runs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Mean seconds and largest peak of quantizing, without the evaluations."""
    if not runs:
        return GAP, GAP
    stages = [[run["stages"][name] for name in QUANTIZING if name in run["stages"]] for run in runs]
    seconds = statistics.mean(sum(stage["seconds"] for stage in run) for run in stages)
    peak = max(stage["peak_bytes"] for run in stages for stage in run) / 2**20
    return f"{seconds:.0f}", f"{peak:.0f}"


def stages_table(config: str, folder: Path, cell: Cell) -> str:
    """Markdown table of the seconds and peak memory of one cell's stages; empty where the cell is a gap.

    Detection and the floating-point evaluation are left out: they come from a cache in all cells but the first.
    """
    metrics = read_cell(folder, config, cell)
    if metrics is None:
        return ""
    names = [name for name in (*QUANTIZING, "quantized_eval") if name in metrics["stages"]]
    rows = [(name, metrics["stages"][name]) for name in names]
    lines = [f"| stage of {cell.recipe} W{cell.bits}A{cell.bits} | seconds | peak MB |", "|---" * 3 + "|"]
    lines += [f"| {name} | {stage['seconds']:.1f} | {stage['peak_bytes'] / 2**20:.0f} |" for name, stage in rows]
    return "\n".join(lines)


def chart(
    config: str,
    folder: Path,
    table: Table,
    path: Path,
    keys: Sequence[str] = ("mIoU", "IoU_fp"),
    columns: Columns = COLUMNS,
) -> bool:
    """A panel per key with a dot a row, the spread over seeds and floating point as a line, as PNG; False without data.

    Dots instead of bars, because bars would have to start at 0, where the differences cannot be seen.
    """
    figures = [row for row in collect(config, folder, table.rows) if row.values(keys[0])]
    if not figures:
        return False
    figure = Figure(figsize=(4.5 * len(keys), 1.3 + 0.3 * len(figures)), layout="constrained")
    several = len({row.row.cell.bits for row in figures}) > 1
    places = range(len(figures))
    titles = {key: title for title, key, _ in columns}
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        values = [row.values(key) for row in figures]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar([statistics.mean(v) for v in values], places, xerr=spread, fmt="o", color="#4878a8", capsize=3)
        floating = figures[0].runs[0]["fp"]
        if key in floating:
            axes.axvline(floating[key], color="black", linewidth=1, label="floating point")
            axes.legend(loc="best", fontsize=8)
        axes.set_yticks(places, [f"{r.row.label} W{r.row.cell.bits}" if several else r.row.label for r in figures])
        axes.set_xlabel(titles[key])
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", linewidth=0.4)
        axes.margins(y=0.15 if len(figures) < 6 else 0.05)
    axes.invert_yaxis()  # shared: the first row on top
    figure.suptitle(table.title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def page(suite: Suite) -> str:
    """The page of a suite: every table with its picture; writes the pictures into its folder."""
    folder = suite.folder
    parts = [f"# Results\n\nWritten by `tools/results_table.py --write`; {suite.note}\n"]
    for table in suite.tables:
        text = markdown(suite.config, folder, table.rows, columns=suite.columns)
        parts.append(f"## {table.title}\n\n{text}\n")
        picture = folder / f"{table.name}.png"
        if chart(suite.config, folder, table, picture, suite.keys, suite.columns):
            parts.append(f"![{table.title}]({folder.name}/{picture.name})\n")
    return "\n".join(parts)


def update_readme(readme: Path, text: str) -> None:
    """Put ``text`` between the markers of ``readme``.

    Raises:
        ValueError: the markers are missing.
    """
    content = readme.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    before, rest = content.split(BEGIN, 1)
    write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", readme)
