# SPDX-License-Identifier: Apache-2.0
"""Reports of Vivado in their documented format, and what is missing in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ahcq_plugin.hls.synth import SynthesisError
from ahcq_plugin.hls.vivado import read_timing, read_utilization

LINE = "+-------------------+--------+-------+------------+-----------+-------+"
UTILIZATION = f"""Copyright 1986-2022 Xilinx, Inc. All Rights Reserved.
---------------------------------------------
| Tool Version : Vivado v.2022.2 (lin64)
| Design       : ahcq_engine
| Device       : xczu9eg-ffvb1156-2-e
| Design State : Fully Placed
---------------------------------------------
{LINE}
|     Site Type     |  Used  | Fixed | Prohibited | Available | Util% |
{LINE}
| CLB LUTs*         | 201234 |     0 |          0 |    274080 | 73.42 |
|   LUT as Logic    | 180000 |     0 |          0 |    274080 | 65.67 |
| CLB Registers     | 120004 |     0 |          0 |    548160 | 21.89 |
| Block RAM Tile    |  240.5 |     0 |          0 |       912 | 26.37 |
|   RAMB36/FIFO*    |    240 |     0 |          0 |       912 | 26.32 |
| DSPs              |    761 |     0 |          0 |      2520 | 30.20 |
|   DSP48E2 only    |    761 |       |            |           |       |
{LINE}
"""
TIMING = """| Design State : Routed
------------------------------------------------
| Design Timing Summary
| ---------------------
------------------------------------------------

    WNS(ns)      TNS(ns)  TNS Failing Endpoints  TNS Total Endpoints      WHS(ns)      THS(ns)  THS Failing Endpoints
    -------      -------  ---------------------  -------------------      -------      -------  ---------------------
     -0.342       -1.250                      4                  200        0.050        0.000                      0

Timing constraints are not met.
"""


def written(folder: Path, text: str) -> Path:
    (folder / "report.rpt").write_text(text, encoding="utf-8")
    return folder / "report.rpt"


def test_what_placement_took_is_read(tmp_path: Path) -> None:
    found = read_utilization(written(tmp_path, UTILIZATION))
    assert found.state == "Fully Placed"
    assert found.used == dict(lut=201234, ff=120004, dsp=761, bram=240.5)
    assert found.available == dict(lut=274080, ff=548160, dsp=2520, bram=912)
    older = UTILIZATION.replace("CLB LUTs*", "Slice LUTs").replace("CLB Reg", "Slice Reg")
    assert read_utilization(written(tmp_path, re.sub(r" +0 \|( +\d+ \|)( +\d+\.)", r"\1\2", older))) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| Design State", "| Other", "has no Design State"),
        ("| DSPs ", "| Other ", "no row `DSPs` with two numbers"),
        ("| 201234 |", "| many |", "no row `CLB LUTs` with two numbers"),
    ],
)
def test_what_is_missing_in_a_utilization_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in UTILIZATION
    with pytest.raises(SynthesisError, match=message):
        read_utilization(written(tmp_path, UTILIZATION.replace(old, new)))


def test_worst_slacks_are_read(tmp_path: Path) -> None:
    found = read_timing(written(tmp_path, TIMING))
    assert (found.setup_ns, found.hold_ns, found.meets_timing) == (-0.342, 0.05, False)
    assert read_timing(written(tmp_path, TIMING.replace("-0.342", " 0.000"))).meets_timing
    assert not read_timing(written(tmp_path, TIMING.replace("-0.342", " 0.000").replace("0.050", "-.001"))).meets_timing


def test_a_timing_report_without_slacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match="no slack, got 'NA.*clock constraints"):
        read_timing(written(tmp_path, TIMING.replace("-0.342", "    NA")))
    with pytest.raises(SynthesisError, match="no Design Timing Summary"):
        read_timing(written(tmp_path, UTILIZATION))
