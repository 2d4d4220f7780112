# SPDX-License-Identifier: Apache-2.0
"""The results table: cells (recipe x bits) of one config, each cached by a hash of what determines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ahcq_plugin.mm.cache import digest
from ahcq_plugin.mm.files import write_json, write_text
from ahcq_plugin.mm.launch import launch, read_config
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.zoo.sam import default_checkpoint

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
#: Columns: title, part of metrics.json, key, format.
COLUMNS = (
    ("AP", "AP", "{:.3f}"),
    ("AP50", "AP50", "{:.3f}"),
    ("AP, true boxes", "AP_gt", "{:.3f}"),
    ("mIoU", "mIoU", "{:.4f}"),
    ("IoU to FP", "IoU_fp", "{:.4f}"),
)
GAP = "–"
QUANTIZING = ("prepare", "calibrate", "reconstruct", "freeze", "audit")


@dataclass(frozen=True)
class Cell:
    """One row of the table: a recipe at equal bits of weights and activations."""

    recipe: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.recipe}_w{self.bits}a{self.bits}"

    def options(self) -> dict[str, Any]:
        """Overrides of the config."""
        return {"recipe.name": self.recipe, "recipe.w_bits": self.bits, "recipe.a_bits": self.bits}


CELLS = (
    *(Cell("rtn", bits) for bits in (8, 6, 4)),
    *(Cell("qdrop", bits) for bits in (8, 6, 4)),
    Cell("adaround", 4),
    Cell("brecq", 4),
)


def cell_key(config: str, cell: Cell) -> str:
    """Hash of recipe, prompts, calibration and the SAM's weights: what a cell's figures depend on in this repository.

    The data are not part of it: figures made on other data belong into another folder.
    """
    cfg: Config = read_config(config, cell.options())
    loop = {k: v for k, v in cfg.test_cfg.items() if k not in ("cache_dir", "resume", "device")}
    loop["calib"] = {k: v for k, v in loop.get("calib", {}).items() if k != "dataset"}
    weights = Path(cfg.sam.get("checkpoint") or default_checkpoint(cfg.sam["name"]))
    content = [
        Recipe.from_config(cfg.recipe).to_dict(),
        loop,
        dict(cfg.sam),
        hashlib.sha256(weights.read_bytes()).hexdigest(),
    ]
    return digest(json.loads(json.dumps(content, default=str)))


def read_cell(folder: Path, config: str, cell: Cell) -> dict[str, Any] | None:
    """Stored metrics of a cell; None where there are none or they were made with other settings or weights."""
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["metrics"] if stored["key"] == cell_key(config, cell) else None


def fill(
    config: str, folder: Path, work_dir: Path, cells: Sequence[Cell] = CELLS, run: Callable[..., int] = launch
) -> list[str]:
    """Run every cell that has no valid figures, resuming interrupted ones; returns the names of those that failed."""
    failed = []
    for cell in cells:
        if read_cell(folder, config, cell) is not None:
            continue
        key = cell_key(config, cell)
        place = work_dir / f"{cell.name}-{key[:12]}"
        if run(config, str(place), cell.options(), resume=True) != 0:
            failed.append(cell.name)
            continue
        metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        write_json({"key": key, "config": config, "metrics": metrics}, folder / f"{cell.name}.json")
    return failed


def table(config: str, folder: Path, cells: Sequence[Cell] = CELLS) -> str:
    """Markdown table; a missing cell is a row of gaps."""
    found = {cell: read_cell(folder, config, cell) for cell in cells}
    titles = [title for title, _, _ in COLUMNS]
    lines = [
        "| recipe | bits | " + " | ".join(titles) + " | seconds | peak MB |",
        "|---" * (len(titles) + 4) + "|",
    ]
    done = [metrics for metrics in found.values() if metrics is not None]
    if done:
        lines.append(_row("floating point", "32", done[0]["fp"], GAP, GAP))
    for cell, metrics in found.items():
        bits = f"W{cell.bits}A{cell.bits}"
        if metrics is None:
            lines.append(f"| {cell.recipe} | {bits} | " + " | ".join([GAP] * (len(titles) + 2)) + " |")
            continue
        stages = [metrics["stages"][name] for name in QUANTIZING]
        seconds = sum(stage["seconds"] for stage in stages)
        peak = max(stage["peak_bytes"] for stage in stages) / 2**20
        lines.append(_row(cell.recipe, bits, metrics["quantized"], f"{seconds:.0f}", f"{peak:.0f}"))
    return "\n".join(lines)


def _row(name: str, bits: str, figures: dict[str, float], seconds: str, peak: str) -> str:
    values = [form.format(figures[key]) if key in figures else GAP for _, key, form in COLUMNS]
    return f"| {name} | {bits} | " + " | ".join([*values, seconds, peak]) + " |"


def stages_table(config: str, folder: Path, cell: Cell) -> str:
    """Markdown table of the seconds and peak memory of one cell's stages; empty where the cell is a gap.

    Detection and the floating-point evaluation are left out: they come from a cache in all cells but the first.
    """
    metrics = read_cell(folder, config, cell)
    if metrics is None:
        return ""
    rows = [(name, metrics["stages"][name]) for name in (*QUANTIZING, "quantized_eval")]
    lines = [f"| stage of {cell.recipe} W{cell.bits}A{cell.bits} | seconds | peak MB |", "|---" * 3 + "|"]
    lines += [f"| {name} | {stage['seconds']:.1f} | {stage['peak_bytes'] / 2**20:.0f} |" for name, stage in rows]
    return "\n".join(lines)


def update_readme(readme: Path, markdown: str) -> None:
    """Put the table between the markers of ``readme``.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    before, rest = text.split(BEGIN, 1)
    write_text(f"{before}{BEGIN}\n{markdown}\n{END}{rest.split(END, 1)[1]}", readme)
