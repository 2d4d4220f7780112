# SPDX-License-Identifier: Apache-2.0
"""Engines of other sizes and number formats, put together from counts of their parts."""

from __future__ import annotations

from ahcq_plugin.hls.engine import counts, sizes
from ahcq_plugin.hls.engine.config import FP32, INT8, PAPER, EngineConfig
from ahcq_plugin.hls.rtl.errors import ToolError


def part(process: str, lut: int | None, dsp: int | None = 0, bram: float | None = 0, instances: int = 1) -> dict:
    reason = "too long" if lut is None else None
    return dict(process=process, instances=instances, lut=lut, ff=0, dsp=dsp, bram=bram, reason=reason)


PARTS = [
    part("fetch", 100),
    part("buffer_right", 300),
    part("multiply", 50, 4, instances=16),
    part("correct", 70, 1, instances=2),
    part("gelu_unit", 20, 2, instances=4),
    part("write", 10, instances=2),
    part(counts.JOINS, 640, 0, 240.0),
]


def test_an_engine_of_its_own_counts_is_their_sum_and_what_is_missing_is_named() -> None:
    in_cells = counts.CELL_PROCESSES
    four = [dict(row, instances=row["instances"] * (2 if row["process"] in in_cells else 1)) for row in PARTS]
    four[0] = part("fetch", 200)
    four[-1] = part(counts.JOINS, None, None, None)
    two_row, four_row = sizes.counted_sizes({EngineConfig(2): PARTS, EngineConfig(4): four})
    assert two_row == dict(cells=2, digit=4, shift_lanes=True, lut=2080, dsp=74, bram=240.0, fits=True, how="counted")
    assert four_row["lut"] == 200 + 300 + 2 * (800 + 140 + 80 + 20) + 2 * 640 and four_row["bram"] == 480
    assert four_row["how"] == f"{counts.JOINS} of 2 cells"
    (row,) = sizes.counted_sizes({EngineConfig(4): four})
    assert row["lut"] is None and row["fits"] is None


def test_formats_are_compared_at_the_luts_of_int4_and_the_dsps_of_the_board() -> None:
    of_int8 = [*PARTS[:-1], part("decode", 500, 4, instances=2), part(counts.JOINS, 1000, 0, 354.0)]
    of_fp32 = [part("buffer_right_floats", 300), part("multiply_floats", 800, 128, instances=16)]
    of_fp32 += [part("write", 10, instances=2), part(counts.JOINS, 640, 0, 240.0)]
    int4, int8, fp32 = sizes.baseline_engines(PARTS, of_int8, of_fp32)
    assert int4 == dict(format="INT4", how="counted", lut=2080, dsp=74, bram=240.0, elements=128)
    assert int8 | dict(elements=0) == dict(format="INT8", how="counted", lut=3440, dsp=82, bram=354.0, elements=0)
    assert int8["elements"] == int((2080 - 400) / ((3440 - 400) / 128))
    assert fp32 | dict(elements=0) == dict(format="FP32", how="counted", lut=13760, dsp=2048, bram=240.0, elements=0)
    assert fp32["elements"] == int((2080 - 300) / ((13760 - 300) / 128))
    many = [row | dict(lut=1) if row["process"] in counts.CELL_PROCESSES else row for row in of_int8]
    many[-2] = part("decode", 1, 100, instances=20)  # then DSPs are what ends first
    assert sizes.baseline_engines(PARTS, many, of_fp32)[1]["elements"] == int(2520 / ((74 + 2000) / 128))
    large = [part("buffer_right_floats", 3000), *of_fp32[1:]]  # more than INT4's engine before it has an element
    assert sizes.baseline_engines(PARTS, of_int8, large)[2]["elements"] == 0
    assert sizes.baseline_engines([*PARTS, part("decode", None)], PARTS, of_fp32) == []


def test_without_counting_all_there_are_multiples_and_the_paper_is_not_counted_again(monkeypatch) -> None:
    found = sizes.size_figures(PARTS, [2, 4], False)
    assert [row["how"] for row in found["sizes"]] == ["counted", "multiple of 2 cells"] and found["engines"] == []
    asked, said = [], []
    monkeypatch.setattr(sizes, "counted_parts", lambda config, cache: asked.append(config) or PARTS)
    found = sizes.size_figures(PARTS, [2, 4], True, say=said.append)
    compact = [EngineConfig(cells, digit, shift_lanes=False) for digit in (4, 17) for cells in (2, 4)]
    assert asked == [EngineConfig(4), EngineConfig(2, 17), EngineConfig(4, 17), *compact, INT8, FP32]
    assert said == [f"{config.cpp}: 2,080 LUT" for config in (PAPER, *asked)]
    kinds = [(row["cells"], row["digit"], row["shift_lanes"]) for row in found["sizes"]]
    assert kinds == [(cells, digit, shifts) for shifts in (True, False) for digit in (4, 17) for cells in (2, 4)]
    assert [row["format"] for row in found["engines"]] == ["INT4", "INT8", "FP32"]


def test_counts_beyond_the_limit_are_parts_with_a_reason(monkeypatch) -> None:
    def late(*args, **options):
        raise ToolError("yosys had not counted it after 1 s of a core")

    monkeypatch.setattr(counts, "count", late)
    rtl = counts.EngineRtl({"fetch_process.sv": ""}, {"fetch_process": 3}, {"fetch_process": 1})
    monkeypatch.setattr(sizes, "engine_rtl", lambda config: rtl)
    rows = sizes.counted_parts(EngineConfig(2), limit=1)
    assert [row["process"] for row in rows] == ["fetch", counts.JOINS] and all(row["reason"] for row in rows)
