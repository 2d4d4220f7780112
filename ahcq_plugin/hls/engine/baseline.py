# SPDX-License-Identifier: Apache-2.0
"""Processing elements of equal shape, eight inputs and an accumulator, of INT4, INT8 and FP32: RTL and cells."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, Rtl, compile_rtl
from ahcq_plugin.hls.rtl.cells import count
from ahcq_plugin.hls.rtl.errors import ToolError
from ahcq_plugin.support.files import write_text

#: Number format -> (C++ of the process, its types of inputs and sums).
ELEMENTS = {
    "INT4": ("pe_integer<4>", "uint8_t", "uint32_t"),
    "INT8": ("pe_integer<8>", "uint8_t", "uint32_t"),
    "FP32": ("pe_float", "float", "float"),
}
_SOURCE = """#include "ahcq/engine/baseline.h"
using namespace ahcq::engine;
void element(hls::stream<pe_inputs<{inputs}> >& in, hls::stream<{sums}>& out) {{
#pragma HLS DATAFLOW
    {process}(in, out);
}}
"""


def element_rtl(number: str, cache: Path | None = None) -> Rtl:
    """The RTL of an element of ``ELEMENTS``, at a turn a cycle.

    Raises:
        ToolError: a package of the extra ``rtl`` is missing.
    """
    process, inputs, sums = ELEMENTS[number]
    with tempfile.TemporaryDirectory(prefix="ahcq_element_") as folder:
        source = Path(folder) / "element.cpp"
        write_text(_SOURCE.format(process=process, inputs=inputs, sums=sums), source)
        return compile_rtl(Program(source, (sources("include"),)), "element", cache=cache)


def element_rows(
    board: Mapping[str, int], cache: Path | None = None, limit: float | None = None
) -> list[dict[str, Any]]:
    """A row for each element: its cells or why there are none, and how many of it alone ``board`` would hold.

    Args:
        board: cells that there are, by their names.
        limit: seconds of a core for yosys.
    """
    rows = []
    for number in ELEMENTS:
        rtl = element_rtl(number, cache)
        name, stages = next((one, scheduled.stages) for one, scheduled in rtl.scheduled.items())
        row: dict[str, Any] = dict(element=number, stages=stages, reason=None, lut=None, ff=None, dsp=None, fit=None)
        try:
            cells = asdict(count({f"{name}.sv": rtl.files[f"{name}.sv"]}, name, cache, limit=limit))
        except ToolError as error:
            rows.append(row | dict(reason=str(error).splitlines()[0]))
            continue
        fit = min(most // cells[kind] for kind, most in board.items() if cells[kind])
        rows.append(row | {kind: cells[kind] for kind in ("lut", "ff", "dsp")} | dict(fit=fit))
    return rows
