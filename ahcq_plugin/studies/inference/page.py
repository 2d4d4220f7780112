# SPDX-License-Identifier: Apache-2.0
"""The measured ways as Markdown and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ahcq_plugin.studies.inference.bench import Part, Row
from ahcq_plugin.studies.inference.variants import VARIANTS
from ahcq_plugin.support.files import read_json, replacing, write_json, write_text
from ahcq_plugin.support.typed import typed

OURS = ("ahcq_plugin", "our")
BEGIN, END = "<!-- inference:begin -->", "<!-- inference:end -->"
_AGAIN = "delete it, and measure again"


@dataclass(frozen=True)
class _Stored:
    """Rows that were measured with one number of threads."""

    threads: int
    rows: list[Row]


def read_rows(work: Path) -> dict[str, list[Row]]:
    """Model -> its rows, of all folders that have some."""
    found = {}
    for path in sorted(work.glob("*/rows.json")):
        found[path.parent.name] = _stored(path).rows
    return found


def _stored(path: Path) -> _Stored:
    """What ``keep_row`` wrote. ValueError: damage."""
    return typed(read_json(path, _AGAIN), _Stored, f"{path}: its content")


def keep_row(row: Row, threads: int, path: Path) -> None:
    """Add a row to a file of rows, in the place of an older one; rows of another number of threads go."""
    stored = _stored(path) if path.is_file() else _Stored(threads, [])
    rows = stored.rows if stored.threads == threads else []
    found = {(old.runtime, old.computes): asdict(old) for old in [*rows, row]}
    order = [(way.runtime, way.computes) for way in VARIANTS]
    kept = sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    write_json({"threads": threads, "rows": [old for _, old in kept]}, path)


def write_page(tables: Mapping[str, Sequence[Row]], page: Path) -> None:
    """Put tables between the marks of a page, and the chart beside it.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} needs one line {BEGIN} and one line {END}, for the tables between them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = "\n\n".join(f"### {name}\n\n{table(rows)}" for name, rows in tables.items())
    draw(tables, page.with_suffix(".png"))
    write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", page)


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row for each way, a column for each part, ms least / median and ratio to FP32 PyTorch.

    Rows of several runs may have been asked with other numbers of boxes; the peak is of the most that all have.
    """
    measured, shared = {part.boxes for row in rows for part in row.parts}, _shared(rows)
    shown = any(row.iou is not None for row in rows)
    heads = ["runtime", "computes", *(f"{title(boxes)}, ms" for boxes in sorted(measured)), "peak MB", "file MB"]
    heads += ["IoU to FP32"] if shown else []
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        if row.error:
            continue
        parts = {part.boxes: part for part in row.parts}
        cells = [row.runtime, row.computes]
        cells += [_time(parts[boxes]) if boxes in parts else "–" for boxes in sorted(measured)]
        ends = (shared[0], shared[-1]) if shared else ()
        cells += [" / ".join(f"{parts[boxes].peak / 1e6:.0f}" for boxes in ends if boxes in parts) or "–"]
        cells += [f"{row.bytes / 1e6:.1f}"]
        cells += [f"{row.iou:.3f}"] if shown and row.iou is not None else []
        lines.append(_line([f"**{cell}**" for cell in cells] if is_ours(row) else cells))
    notes = [f"- {row.runtime}, {row.computes}: {row.error}" for row in rows if row.error]
    return "\n".join([*lines, *(["", "Does not run:", "", *notes] if notes else [])])


def _shared(rows: Sequence[Row]) -> list[int]:
    """Numbers of boxes that all rows have; 0 is the encoder."""
    measured = [{part.boxes for part in row.parts} for row in rows if row.parts]
    return sorted(set.intersection(*measured)) if measured else []


def title(boxes: int) -> str:
    """Of a column."""
    if not boxes:
        return "encoder"
    return f"decoder, {boxes} box{'es' if boxes > 1 else ''}"


def is_ours(row: Row) -> bool:
    """Made by this package."""
    return row.runtime == OURS[0] or row.computes.startswith(OURS[1])


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """How many times as fast as FP32 PyTorch each way is: a panel for each model, a dot for each part."""
    figure = Figure(figsize=(5.2 * len(tables), 5.4), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        rows = [row for row in rows if not row.error][::-1]
        for boxes, marker in zip(_shared(rows), "os^D", strict=False):
            values = [part.ratio for row in rows for part in row.parts if part.boxes == boxes]
            colours = ["tab:red" if is_ours(row) else "tab:gray" for row in rows]
            axes.scatter(values, range(len(rows)), c=colours, marker=marker, label=title(boxes))
        axes.set_yticks(range(len(rows)), [f"{row.runtime}\n{row.computes}" for row in rows], fontsize=8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(name)
        axes.set_xlabel("times as fast as FP32 PyTorch (more is better)")
    max(figure.axes, key=lambda axes: len(axes.get_legend_handles_labels()[1])).legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _time(part: Part) -> str:
    least, median = (f"{ms:.{0 if ms >= 100 else 1}f}" for ms in (part.least, part.median))
    return f"{least} / {median} ({part.ratio:.2f}×)"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
