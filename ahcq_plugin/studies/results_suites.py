# SPDX-License-Identifier: Apache-2.0
"""The tables of results and ablations: which runs make a row, which rows a table, which tables a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ahcq_plugin.studies.challenges import LESS_CENTRED
from ahcq_plugin.studies.results import Cell

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
COMPONENTS = ("acnr", "cag", "hluq", "lnq")


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
#: Units learn for longer than the config's 300 iterations.
LONGER = {"iterations": 1000}
#: Recipes that learn with a random half of the activations quantized.
DROPPING = ("qdrop", "ptq4sam", "saqsam", "ahcq", "ahcq_plus")
#: Recipes of papers that learn.
PUBLISHED = ("adaround", "brecq", *DROPPING[:-1])
#: Encoder and decoder tuned, on images of more data sets.
TUNED_CONFIG = "mm_configs/sam_tiny_w4a4_yolox_nano_tuned.py"


def _recipes(bits: int, seeds: int, names: Sequence[str] = (*PUBLISHED, "ahcq_plus")) -> tuple[Row, ...]:
    return (Row("rtn", Cell("rtn", bits)), *(Row(name, Cell(name, bits), seeds) for name in names))


def _switched(name: str, label: str, options: Mapping[str, Any], bits: int, seeds: int) -> Row:
    return Row(f"{name} + {label}", Cell(name, bits, tuple(options.items())), seeds)


def _switches(seeds: int) -> tuple[Row, ...]:
    """What can be added to a recipe, at four bits."""
    extras: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("ahcq", "BIG", {"big": True}),
        ("ahcq", "searched ranges", {"range_by_output_error": True}),
        ("ahcq", "1,000 iterations a unit", LONGER),
        ("ahcq", "decoder tuned", TUNED_DECODER),
        ("ahcq_plus", "1,000 iterations a unit", LONGER),
    )
    return tuple(_switched(*extra, 4, seeds) for extra in extras)


def _centred(what: str, bits: int, seeds: int, label: str = "", **more: Any) -> Row:
    """``ahcq_plus`` with less centred than it does, and ``more`` of its keys."""
    options = tuple((LESS_CENTRED[what] | more).items())
    return Row(f"ahcq_plus, {what} centred{label}", Cell("ahcq_plus", bits, options), seeds)


def _tuned_cell(bits: int, **options: Any) -> Cell:
    return Cell("ahcq_plus", bits, tuple(options.items()), config=TUNED_CONFIG)


def _tuned(bits: int, seeds: int) -> tuple[Row, ...]:
    """What tuning adds to centred heads by steps and images, and what centred norms and more iterations a unit add to
    that."""
    short, longer = _tuned_cell(bits, tune_steps=1800), _tuned_cell(bits, center_norms=True, **LONGER)
    return (
        _centred("heads alone", bits, seeds, ", decoder tuned", **TUNED_DECODER),
        Row("the same, on more images, encoder tuned too", short, seeds),
        Row("the same, four times the steps for the decoder", _tuned_cell(bits), seeds),
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
            *(*_recipes(6, 1, PUBLISHED), Row("ahcq_plus", Cell("ahcq_plus", 6), 3)),
            _switched("ahcq_plus", "1,000 iterations a unit", LONGER, 6, 1),
            *(*(_centred(what, 6, 1) for what in ("nothing", "heads alone")), *_tuned(6, 1)),
            *(*_recipes(5, 1), *(_centred(what, 5, 1) for what in ("nothing", "norms alone"))),
            *(*_recipes(4, 3), *_switches(3), *(_centred(what, 4, 3) for what in LESS_CENTRED)),
            *(_centred("nothing", 4, 3, ", one scale a head", per_head=True), *_tuned(4, 3)),
            Row(
                "on more images, encoder tuned too, one scale a head", _tuned_cell(4, tune_steps=1800, per_head=True), 3
            ),
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
