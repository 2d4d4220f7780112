# SPDX-License-Identifier: Apache-2.0
"""Cells of an FPGA that an engine takes, process by process, as yosys counts them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.engine.baseline import element_rows
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.rtl import TOP, EngineRtl, engine_rtl
from ahcq_plugin.hls.rtl.cells import Cells, count, count_each
from ahcq_plugin.hls.rtl.errors import ToolError

BOARD = dict(lut=274080, dsp=2520, bram=912)  # ZCU102
#: Processes that every cell has of its own; the others are there once.
CELL_PROCESSES = ("decode", "multiply", "correct", "dequantize", "dequantize_lane", "gelu_unit", "quantize", "write")
CELL_PROCESSES += ("spread_floats", "multiply_floats", "finish_floats", "gather_floats")  # of the engine of float32
#: What joins the processes, a row as theirs.
JOINS = "FIFOs, memories, AXI4 ports"
#: Seconds of a core that yosys may take for a process.
LIMIT = 300
_PART = re.compile(r"^  (ahcq_\w+) (?:#\((.*?)\n  \) )?\w+ \(", re.MULTILINE | re.DOTALL)


def synthesis(
    rtl: EngineRtl, cache: Path | None = None, workers: int = 2, limit: float = LIMIT
) -> dict[str, Cells | str]:
    """Of every process, by its name, and of ``JOINS`` the cells that yosys counts, or why there is no count.

    Args:
        workers: how many at a time.
        limit: seconds of a core for each.
    """

    def counted(name: str) -> Cells | str:
        try:
            if name == JOINS:
                return joins(rtl, cache, limit)
            text = rtl.files[f"{name}.sv"]
            return count({f"{name}.sv": text}, name, cache, limit=limit)
        except ToolError as error:
            return str(error).splitlines()[0]  # the rest is yosys' own

    names = [JOINS, *sorted(rtl.stages, key=lambda name: -len(rtl.files[f"{name}.sv"]))]  # the longest first
    with ThreadPoolExecutor(workers) as pool:  # each is a process of its own
        found = dict(zip(names, pool.map(counted, names), strict=True))
    return {name: found[name] for name in (*rtl.stages, JOINS)}


def joins(rtl: EngineRtl, cache: Path | None = None, limit: float | None = None) -> Cells:
    """Cells of what joins the processes: each width and depth of a FIFO or memory is counted once.

    Raises:
        ToolError: pyosys is missing or fails, or takes longer than ``limit``.
    """
    own = count(
        rtl.files, TOP, cache, limit, without=[name.removesuffix(".sv") for name in rtl.files if name != f"{TOP}.sv"]
    )
    parts: Counter[str] = Counter()
    modules: dict[str, str] = {}
    for file in rtl.files.keys() - {f"{name}.sv" for name in rtl.stages}:
        for module, given in _PART.findall(rtl.files[file]):
            parameters = re.findall(r"\.(\w+)\((\d+)\)", given)
            name = "_".join([module, *(f"{key}{value}".lower() for key, value in parameters)])
            text = rtl.files[f"{module}.sv"].replace(f"module {module} ", f"module {name} ")
            for key, value in parameters:
                text = re.sub(rf"(parameter \w+ {key}) = \d+", rf"\1 = {value}", text)
            parts[name] += 1
            modules[name] = text
    found = count_each(modules, cache, limit)
    whole = {
        key: value + sum(asdict(found[name])[key] * times for name, times in parts.items())
        for key, value in asdict(own).items()
    }
    return Cells(**whole)


def counted(config: EngineConfig, cache: Path | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``processes`` of the engine and ``elements`` of the report."""
    rtl = engine_rtl(config)
    return process_rows(rtl, synthesis(rtl, cache)), element_rows(BOARD, cache, LIMIT)


def process_rows(rtl: EngineRtl, cells: Mapping[str, Cells | str]) -> list[dict[str, Any]]:
    """A row for each process and for what joins them, with the cells of one or the reason why not; then their sum.

    Of a row: how often it is there, and pipeline stages. The sum is None where a part is.
    """
    rows: list[dict[str, Any]] = []
    for name, stages in [*rtl.stages.items(), (JOINS, None)]:
        found = cells.get(name, "not counted")
        row = dict(process=name.removesuffix("_process"), instances=rtl.instances.get(name, 1), stages=stages)
        if isinstance(found, Cells):
            rows.append(row | dict(reason=None) | asdict(found))
        else:
            rows.append(row | dict(reason=found) | dict.fromkeys(Cells.__dataclass_fields__))
    whole: dict[str, Any] = dict(
        process="sum", instances=sum(row["instances"] for row in rows), stages=None, reason=None
    )
    return [*rows, whole | {field: _sum(rows, field) for field in Cells.__dataclass_fields__}]


def _sum(rows: Sequence[Mapping[str, Any]], field: str, times: float = 1) -> float | None:
    """Of all instances; those that every cell has count ``times`` as often. None where a part is."""
    if any(row[field] is None for row in rows):
        return None
    return sum(
        row[field] * row["instances"] * (times if row["process"] in (*CELL_PROCESSES, JOINS) else 1) for row in rows
    )


def size_rows(
    rows: Sequence[Mapping[str, Any]], counted: int, cells: Sequence[int], digit: int, shift_lanes: bool = True
) -> list[dict[str, Any]]:
    """What engines of other numbers of cells take, by multiples of what every cell has; and whether the board holds it.

    Args:
        rows: of ``process_rows`` without their sum, of an engine of ``counted`` cells. What joins them counts as a part
            of the cells.
        digit, shift_lanes: of that engine.
    """
    found = []
    for number in cells:
        row: dict[str, Any] = {key: _sum(rows, key, number / counted) for key in BOARD}
        fits = None if None in row.values() else all(row[key] <= most for key, most in BOARD.items())
        how = "counted" if number == counted else f"multiple of {counted} cells"
        found.append(dict(cells=number, digit=digit, shift_lanes=shift_lanes, **row, fits=fits, how=how))
    return found
