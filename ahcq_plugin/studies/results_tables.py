# SPDX-License-Identifier: Apache-2.0
"""The tables of results and ablations: which runs make a row, and how rows become Markdown and charts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ahcq_plugin.mm.quantization_loop import STAGES
from ahcq_plugin.studies.challenges import LESS_CENTRED
from ahcq_plugin.studies.results import Cell, read_cell
from ahcq_plugin.support.files import replacing, write_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
#: Columns: title, key in metrics.json, format.
COLUMNS = (
    ("AP", "AP", "{:.3f}"),
    ("AP50", "AP50", "{:.3f}"),
    ("AP, true boxes", "AP_gt", "{:.3f}"),
    ("mIoU", "mIoU", "{:.4f}"),
    ("IoU to FP", "IoU_fp", "{:.4f}"),
)
VIDEO_COLUMNS = tuple(
    (title, key, "{:.4f}") for title, key in (("J&F",) * 2, ("J",) * 2, ("F",) * 2, ("J to FP", "J_fp"))
)
Columns = Sequence[tuple[str, str, str]]
GAP = "–"
COMPONENTS = ("acnr", "cag", "hluq", "lnq")
QUANTIZING = tuple(name for name in STAGES if name not in ("detect", "fp_eval", "quantized_eval"))


@dataclass(frozen=True)
class Row:
    """One line of a table: the mean of ``cell`` over seeds 0 .. ``seeds`` - 1."""

    label: str
    cell: Cell
    seeds: int = 1

    def cells(self) -> list[Cell]:
        """One for each seed."""
        return [replace(self.cell, seed=seed) for seed in range(self.seeds)]


@dataclass(frozen=True)
class Table:
    """Rows under a title; ``name`` chooses it on the command line and names its picture."""

    name: str
    title: str
    rows: tuple[Row, ...]

    def cells(self) -> list[Cell]:
        """All runs, first seeds first: an interrupted fill leaves no row without figures."""
        return sorted((cell for row in self.rows for cell in row.cells()), key=lambda cell: cell.seed)


#: The decoder of SAM learns from its masks, on more images than calibrate.
TUNED_DECODER = {
    "tune_steps": 1500,
    "tune_weight_lr": 0.005,
    "tune_units": ("mask_decoder.*",),
    "test_cfg.calib.tune_images": 256,
}
#: Recipes that learn with a random half of the activations quantized.
DROPPING = ("qdrop", "ptq4sam", "saqsam", "ahcq", "ahcq_plus")
#: Encoder and decoder tuned, on images of more data sets.
TUNED_CONFIG = "mm_configs/sam_tiny_w4a4_yolox_nano_tuned.py"


def _recipes(bits: int, seeds: int, names: Sequence[str] = ("adaround", "brecq", *DROPPING)) -> tuple[Row, ...]:
    return (Row("rtn", Cell("rtn", bits)), *(Row(name, Cell(name, bits), seeds) for name in names))


def _switched(name: str, label: str, options: Mapping[str, Any], bits: int, seeds: int) -> Row:
    return Row(f"{name} + {label}", Cell(name, bits, tuple(options.items())), seeds)


def _switches(seeds: int) -> tuple[Row, ...]:
    """What can be added to a recipe, at four bits."""
    extras: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("ahcq", "BIG", {"big": True}),
        ("ahcq", "searched ranges", {"range_by_output_error": True}),
        ("ahcq", "1,000 iterations a unit", {"iterations": 1000}),
        ("ahcq", "decoder tuned", TUNED_DECODER),
        ("ahcq_plus", "1,000 iterations a unit", {"iterations": 1000}),
    )
    return tuple(_switched(*extra, 4, seeds) for extra in extras)


def _centred(what: str, bits: int, seeds: int, label: str = "", **more: Any) -> Row:
    """``ahcq_plus`` with less centred than it does, and ``more`` of its keys."""
    options = tuple((LESS_CENTRED[what] | more).items())
    return Row(f"ahcq_plus, {what} centred{label}", Cell("ahcq_plus", bits, options), seeds)


def _tuned(bits: int, seeds: int) -> tuple[Row, ...]:
    """What tuning adds to centred heads by steps and images, and what centred norms and more iterations a unit add to
    that."""
    cell = Cell("ahcq_plus", bits, config=TUNED_CONFIG)
    short = replace(cell, options=(("tune_steps", 1800),))
    longer = replace(cell, options=(("center_norms", True), ("iterations", 1000)))
    return (
        _centred("heads alone", bits, seeds, ", decoder tuned", **TUNED_DECODER),
        Row("the same, on more images, encoder tuned too", short, seeds),
        Row("the same, four times the steps for the decoder", cell, seeds),
        Row("the same, norms centred too, 1,000 iterations a unit before", longer, seeds),
    )


def _video_recipes(seeds: int) -> tuple[Row, ...]:
    """Six bits once, four bits over ``seeds`` where chance plays a part."""
    names = ("qdrop", "ptq4sam", "ahcq", "ahcq_plus")
    six = [Row(name, Cell(name, 6)) for name in ("rtn", *names)]
    return (*six, Row("rtn", Cell("rtn", 4)), *(Row(name, Cell(name, 4), seeds) for name in names))


def _twin(seeds: int) -> tuple[Row, ...]:
    """Four bits, without the recipes that hardly gain over rtn on sam_tiny."""
    return (*_recipes(4, seeds, DROPPING), *(_centred(what, 4, seeds) for what in ("nothing", "norms alone")))


def _variants(*variants: tuple[str, tuple[tuple[str, Any], ...]]) -> tuple[Row, ...]:
    """qdrop W4A4 with options."""
    return tuple(Row(label, Cell("qdrop", 4, options)) for label, options in variants)


def _components(bits: int) -> tuple[Row, ...]:
    """qdrop alone, with each component, and ahcq, which has all (table III of AHCQ-SAM, there at five bits)."""
    alone = [Row(name.upper(), Cell("qdrop", bits, ((name, True),))) for name in COMPONENTS]
    return (Row("none (qdrop)", Cell("qdrop", bits)), *alone, Row("all (ahcq)", Cell("ahcq", bits)))


def _group_options(count: int) -> tuple[tuple[str, Any], ...]:
    """Four groups are the default: the same run as CAG alone."""
    return (("cag", True),) if count == 4 else (("cag", True), ("cag_groups", count))


TABLES = (
    Table(
        "recipes",
        "Recipes",
        (
            *(Row(name, Cell(name, 8)) for name in ("rtn", "qdrop")),
            *(*_recipes(6, 1), *(_centred(what, 6, 1) for what in ("nothing", "heads alone")), *_tuned(6, 1)),
            *(*_recipes(5, 1), *(_centred(what, 5, 1) for what in ("nothing", "norms alone"))),
            *(*_recipes(4, 3), *_switches(3), *(_centred(what, 4, 3) for what in LESS_CENTRED)),
            *(_centred("nothing", 4, 3, ", one scale a head", per_head=True), *_tuned(4, 3)),
        ),
    ),
    Table(
        "components",
        "Components, each alone on top of qdrop and each left out of ahcq, W4A4",
        (
            *_components(4),
            *(Row(f"all but {name.upper()}", Cell("ahcq", 4, ((name, False),))) for name in COMPONENTS),
        ),
    ),
    Table("components5", "Components, each alone on top of qdrop, W5A5", _components(5)),
    Table(
        "post_act",
        "Quantizer after GELU and ReLU, W4A4",
        _variants(
            ("uniform", ()), ("power of two", (("families.post_act", "power_of_two"),)), ("HLUQ", (("hluq", True),))
        ),
    ),
    Table(
        "softmax",
        "Quantizer after softmax, W4A4",
        _variants(
            ("uniform", ()),
            ("power of two", (("families.softmax", "power_of_two"),)),
            ("AGQ", (("agq", True),)),
            ("HLUQ", (("families.softmax", "hluq"),)),
            ("LNQ", (("lnq", True),)),
        ),
    ),
    Table(
        "groups",
        "Number of channel groups (CAG), W4A4",
        (
            *(Row(str(n), Cell("qdrop", 4, _group_options(n))) for n in (1, 2, 4, 8, 16, 32)),
            Row("per channel", Cell("qdrop", 4, _group_options(0))),
        ),
    ),
    Table(
        "condition",
        "Condition numbers, W4A4",
        _variants(
            ("none", ()),
            ("CondiQuant-style", (("condiquant", True),)),
            ("ACNR, local error", (("acnr", True),)),
            ("ACNR, accumulated error", (("acnr", True), ("acnr_error", "accumulated"))),
        ),
    ),
)


@dataclass(frozen=True)
class Suite:
    """Tables of the runs of one config. ``folder`` keeps the figures of each run; ``keys`` are what charts show;
    ``note`` says how the figures are made."""

    config: str
    folder: Path
    columns: tuple[tuple[str, str, str], ...]
    tables: tuple[Table, ...]
    keys: tuple[str, ...]
    note: str


VIDEO_NOTE = (
    "official J&F, all frames but the first and the last; four generated clips of four frames, two objects each, to "
    "calibrate; 100 iterations a unit; one thread of a busy CPU. Every row passed the audit."
)
SUITES = {
    "images": Suite(
        "mm_configs/sam_tiny_w4a4_yolox_nano_coco.py",
        Path("docs/results"),
        COLUMNS,
        TABLES,
        ("mIoU", "IoU_fp"),
        "how the figures are made stands in the README.",
    ),
    "hard": Suite(
        "mm_configs/sam_tiny_hard_w4a4_yolox_nano_coco.py",
        Path("docs/results_hard"),
        COLUMNS,
        (Table("recipes", "sam_tiny_hard, the twin with SAM-B's extremes", _twin(3)),),
        ("mIoU", "IoU_fp"),
        "as docs/results.md, of the twin that [challenges.md](challenges.md) describes.",
    ),
    "clips": Suite(
        "mm_configs/demo_sam2_tiny_w4a4.py",
        Path("docs/results_clips"),
        VIDEO_COLUMNS,
        (
            Table(
                "recipes",
                "SAM 2 tiny, 16 generated clips of 12 frames",
                (*_video_recipes(3), _centred("nothing", 4, 3)),
            ),
        ),
        ("J&F", "J_fp"),
        VIDEO_NOTE,
    ),
    "davis": Suite(
        "mm_configs/sam2_tiny_w4a4_davis_subset.py",
        Path("docs/results_davis"),
        VIDEO_COLUMNS,
        (Table("recipes", "SAM 2 tiny, four DAVIS sequences, every fourth frame", _video_recipes(1)),),
        ("J&F", "J_fp"),
        VIDEO_NOTE,
    ),
}


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
