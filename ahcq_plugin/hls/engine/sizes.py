# SPDX-License-Identifier: Apache-2.0
"""What whole engines take: of other sizes, of 17-bit digits, without shift lanes, of INT8 and FP32 at INT4's LUTs.

A figure is counted, every process and what joins them, or a multiple of counted parts; ``how`` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.engine.config import FP32, INT8, NIBBLE, PAPER, PES, WIDE, AnyConfig, EngineConfig
from ahcq_plugin.hls.engine.counts import BOARD, CELL_PROCESSES, JOINS, LIMIT, process_rows, size_rows, synthesis
from ahcq_plugin.hls.engine.rtl import engine_rtl

Row = Mapping[str, Any]


def size_figures(
    paper: Sequence[Row],
    cells: Sequence[int],
    count_all: bool,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """``sizes`` and ``engines`` of the report.

    Args:
        paper: ``counted_parts`` of ``PAPER``.
        cells: numbers of them.
        count_all: count engines of each number of cells, with digits of 4 and of 17 bits, with and without shift lanes,
            and those of INT8 and FP32; else there are multiples of ``paper`` and no ``engines``.
        cache: keeps every count: a run that was broken off goes on where it was.
        say: is told of each engine when it has been counted.
    """
    if not count_all:
        return dict(sizes=size_rows(paper, PAPER.cells, cells, PAPER.digit), engines=[])
    configs = [
        EngineConfig(number, digit, shift_lanes=shifts)
        for shifts in (True, False)
        for digit in (NIBBLE, WIDE.digit)
        for number in cells
    ]

    def counted(config: AnyConfig) -> Sequence[Row]:
        parts = paper if config == PAPER else counted_parts(config, cache)
        late = ", ".join(part["process"] for part in parts if part["reason"])
        say(f"{config.cpp}: " + (f"no count of {late}" if late else f"{total(parts, 'lut'):,.0f} LUT"))
        return parts

    parts = {config: counted(config) for config in configs}
    return dict(sizes=counted_sizes(parts), engines=baseline_engines(paper, counted(INT8), counted(FP32)))


def counted_parts(config: AnyConfig, cache: Path | None = None, limit: float = LIMIT) -> list[dict[str, Any]]:
    """``process_rows`` of an engine of its own RTL, without their sum."""
    rtl = engine_rtl(config)
    return process_rows(rtl, synthesis(rtl, cache, limit=limit))[:-1]


def counted_sizes(parts: Mapping[EngineConfig, Sequence[Row]]) -> list[dict[str, Any]]:
    """Rows as ``size_rows`` gives them, each engine of its own counts.

    A part that has no count is that of the engine of the same kind with the fewest cells, what joins the processes a
    multiple of it; ``how`` names such parts.

    Args:
        parts: of ``counted_parts``.
    """
    rows = []
    for config, own in parts.items():
        kin = (one for one in parts if (one.digit, one.shift_lanes) == (config.digit, config.shift_lanes))
        least = min(kin, key=lambda one: one.cells)
        filled = []
        for part, first in zip(own, parts[least], strict=True):
            times = config.cells / least.cells if part["process"] == JOINS else 1
            other = {key: first[key] and times * first[key] for key in BOARD}
            filled.append({**part, **other} if part["reason"] else part)
        missing = [part["process"] for part in own if part["reason"]]
        (row,) = size_rows(filled, config.cells, [config.cells], config.digit, config.shift_lanes)
        rows.append(row | dict(how=f"{', '.join(missing)} of {least.cells} cells" if missing else "counted"))
    return rows


def baseline_engines(int4: Sequence[Row], int8: Sequence[Row], fp32: Sequence[Row]) -> list[dict[str, Any]]:
    """Engines of two cells' shape, 128 x 8, and how many elements each format has in the LUTs of INT4's.

    Args:
        int4, int8, fp32: ``counted_parts`` of ``PAPER``, ``config.INT8`` and ``config.FP32``.
    Returns:
        A row for each format; none where a count is missing.
    """
    if any(row["reason"] for row in (*int4, *int8, *fp32)):
        return []
    lanes = PAPER.cells * PES
    rows: list[dict[str, Any]] = []
    for number, parts in (("INT4", int4), ("INT8", int8), ("FP32", fp32)):
        row: dict[str, Any] = dict(format=number, how="counted")
        rooms = [float(lanes)] if number == "INT4" else []
        for key in ("lut", "dsp"):
            row[key], fixed = total(parts, key), total(parts, key, once=True)
            if number != "INT4":
                room = rows[0]["lut"] if key == "lut" else BOARD["dsp"]
                rooms.append((room - fixed) * lanes / (row[key] - fixed))
        rows.append(row | dict(bram=total(parts, "bram"), elements=max(0, int(min(rooms)))))
    return rows


def total(parts: Sequence[Row], key: str, once: bool = False) -> float:
    """Of all instances of every part; ``once``: of those that no cell has."""
    return sum(
        part[key] * part["instances"] for part in parts if not once or part["process"] not in (*CELL_PROCESSES, JOINS)
    )
