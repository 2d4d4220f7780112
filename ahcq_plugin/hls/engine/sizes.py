# SPDX-License-Identifier: Apache-2.0
"""What whole engines take: of other sizes, of 17-bit digits, and of INT8 and FP32 beside INT4 at equal LUTs.

A figure is counted, every process and what joins them, or put together from counted parts; ``how`` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.engine.config import LANES, NIBBLE, PAPER, PES, WIDE, EngineConfig
from ahcq_plugin.hls.engine.counts import BOARD, CELL_PROCESSES, JOINS, LIMIT, process_rows, size_rows, synthesis
from ahcq_plugin.hls.engine.rtl import engine_rtl

Row = Mapping[str, Any]
#: Processes of a cell that an engine of float32 has: no codes, no zero points, no scales.
OF_FLOATS = ("gelu_unit", "write")
_BRAM_BITS = 36 * 1024


def size_figures(
    paper: Sequence[Row], elements: Sequence[Row], cells: Sequence[int], count_all: bool, cache: Path | None = None
) -> dict[str, Any]:
    """``sizes`` and ``engines`` of the report.

    Args:
        paper: ``counted_parts`` of ``PAPER``.
        elements: rows of ``baseline.element_rows``.
        cells: numbers of them.
        count_all: count engines of each number of cells, with digits of 4 and of 17 bits, and INT8's; else
            there are multiples of ``paper`` and no ``engines``.
    """
    if not count_all:
        return dict(sizes=size_rows(paper, PAPER.cells, cells, PAPER.digit), engines=[])
    configs = [EngineConfig(number, digit) for digit in (NIBBLE, WIDE.digit) for number in cells]
    parts = {config: paper if config == PAPER else counted_parts(config, cache) for config in configs}
    int8 = counted_parts(EngineConfig(PAPER.cells, 8), cache)
    return dict(sizes=counted_sizes(parts), engines=baseline_engines(paper, int8, elements))


def counted_parts(config: EngineConfig, cache: Path | None = None, limit: float = LIMIT) -> list[dict[str, Any]]:
    """``process_rows`` of an engine of its own RTL, without their sum."""
    rtl = engine_rtl(config)
    return process_rows(rtl, synthesis(rtl, cache, limit=limit))[:-1]


def counted_sizes(parts: Mapping[EngineConfig, Sequence[Row]]) -> list[dict[str, Any]]:
    """Rows as ``size_rows`` gives them, each engine of its own counts.

    A part that has no count is that of the engine with the fewest cells of the same digit, what joins the processes a
    multiple of it; ``how`` names such parts.

    Args:
        parts: of ``counted_parts``.
    """
    rows = []
    for config, own in parts.items():
        least = min((other for other in parts if other.digit == config.digit), key=lambda other: other.cells)
        filled = []
        for part, first in zip(own, parts[least], strict=True):
            times = config.cells / least.cells if part["process"] == JOINS else 1
            other = {key: first[key] and times * first[key] for key in BOARD}
            filled.append({**part, **other} if part["reason"] else part)
        missing = [part["process"] for part in own if part["reason"]]
        (row,) = size_rows(filled, config.cells, [config.cells], config.digit)
        rows.append(row | dict(how=f"{', '.join(missing)} of {least.cells} cells" if missing else "counted"))
    return rows


def baseline_engines(int4: Sequence[Row], int8: Sequence[Row], elements: Sequence[Row]) -> list[dict[str, Any]]:
    """Engines of two cells' shape, 128 x 8, and how many elements each format has in the LUTs of INT4's.

    INT8 is the engine with 8-bit digits whose ``multiply`` is eight elements of INT8, uniform codes in one pass: right
    operands of 8 bits want ``buffer_right`` and its memory twice. FP32 is what of the engine knows no codes, and
    elements of FP32; buffers as large as INT4's hold an eighth of the operands. What that leaves out only adds.

    Args:
        int4, int8: ``counted_parts`` of two cells with digits of 4 and of 8 bits.
        elements: rows of ``baseline.element_rows``.
    Returns:
        A row for each format; none where a count is missing.
    """
    if any(row["reason"] for row in (*int4, *int8, *elements)):
        return []
    of = {row["element"]: row for row in elements}
    whole = {key: total(int4, key) for key in ("lut", "dsp", "bram")}
    memory = 2 * PAPER.right_depth * PES * LANES * NIBBLE / _BRAM_BITS
    rows = [dict(format="INT4", how="counted", **whole, elements=PAPER.cells * PES)]
    for number, parts, kept in (("INT8", int8, CELL_PROCESSES), ("FP32", int4, OF_FLOATS)):
        element = of[number]
        row: dict[str, Any] = dict(format=number, how="put together")
        for key in ("lut", "dsp"):
            fixed = total(parts, key, once=True) + (total(parts, key, ("buffer_right",)) if number == "INT8" else 0)
            behind = total(parts, key, [name for name in kept if name != "multiply"]) + total(parts, key, (JOINS,))
            row[key], row[f"{key}_fixed"] = fixed + behind + PAPER.cells * PES * element[key], fixed
            row[f"{key}_element"] = element[key] + behind / (PAPER.cells * PES)
        row["bram"] = total(parts, "bram") + (memory if number == "INT8" else 0)
        rooms = [(whole["lut"] - row.pop("lut_fixed")) / row.pop("lut_element")]
        rooms += [(BOARD["dsp"] - row.pop("dsp_fixed")) / row.pop("dsp_element")]
        rows.append(row | dict(elements=int(min(rooms))))
    return rows


def total(parts: Sequence[Row], key: str, names: Sequence[str] = (), once: bool = False) -> float:
    """Of all instances of the processes ``names``; none: of every part; ``once``: of those that no cell has."""
    wanted = [
        part
        for part in parts
        if (part["process"] not in (*CELL_PROCESSES, JOINS) if once else not names or part["process"] in names)
    ]
    return sum(part[key] * part["instances"] for part in wanted)
