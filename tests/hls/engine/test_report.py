# SPDX-License-Identifier: Apache-2.0
"""The hardware report: sums, gaps as gaps, the paper's figures, the page."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ahcq_plugin.hls.engine import counts, report
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.cycles import Output, cycles
from ahcq_plugin.hls.engine.launches import Launch
from ahcq_plugin.hls.engine.rtl import EngineRtl
from ahcq_plugin.hls.engine.shape import Shape
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl.cells import Cells

RTL = EngineRtl({}, {"a_process": 2, "multiply_process": 35}, {"a_process": 1, "multiply_process": 8})
A, B = Cells(100, 50, 1, 0.0, 4, 80), Cells(30, 20, 2, 0.5, 1, 25)
LAYER = Shape("linear", "uniform", 4, 4, 15, 0, (768,), 1, 1, 4096, 768)
SCORES = Shape("av", "table", 4, 4, 2**16, 0, (196,), 1, 300, 196, 64)
WORKLOADS = {"encoder": [Launch("u", "fc", LAYER, Output()), Launch("u", "matmul_1", SCORES, Output())]}


def test_the_sum_counts_every_instance_and_knows_what_it_does_not_know() -> None:
    joins = Cells(10, 5, 0, 7.5, 0, 10)
    rows = counts.process_rows(RTL, {"a_process": A, "multiply_process": B, counts.JOINS: joins})
    whole = rows[-1]
    assert (whole["lut"], whole["ff"], whole["dsp"], whole["bram"], whole["instances"]) == (350, 215, 17, 11.5, 10)
    one, four = counts.size_rows(
        rows[:-1], 1, [1, 4], 4
    )  # what is in a cell is there four times, and so is what joins it
    assert one == dict(cells=1, digit=4, shift_lanes=True, lut=350, dsp=17, bram=11.5, fits=True, how="counted")
    assert four | dict(how="") == dict(
        cells=4, digit=4, shift_lanes=True, lut=100 + 4 * 250, dsp=1 + 4 * 16, bram=46.0, fits=True, how=""
    )
    assert four["how"] == "multiple of 1 cells"
    assert not counts.size_rows(rows[:-1], 1, [640], 4)[0]["fits"]  # 10,241 DSP
    first, second, third, whole = counts.process_rows(RTL, {"a_process": A, "multiply_process": "too long"})
    assert first["lut"] == 100 and first["reason"] is None
    assert second["lut"] is None and second["stages"] == 35 and second["reason"] == "too long"
    assert third["process"] == counts.JOINS and third["reason"] == "not counted"
    assert whole["lut"] is None
    assert counts.size_rows([first, second, third], 1, [2], 4) == [
        dict(cells=2, digit=4, shift_lanes=True, lut=None, dsp=None, bram=None, fits=None, how="multiple of 1 cells")
    ]


def test_a_process_that_yosys_does_not_count_has_a_reason_and_the_others_have_counts() -> None:
    text = "module {}_process (input clk, input [7:0] a, output reg [7:0] b); always @(posedge clk) b <= a; endmodule"
    files = {f"{name}_process.sv": text.format(name) for name in ("a", "multiply")}
    top = f"""module inner (input clk, input [7:0] b, output reg [7:0] c); always @(posedge clk) c <= b; endmodule
    module {counts.TOP} (input clk, input [7:0] a, output [7:0] c); wire [7:0] b;
    multiply_process p (clk, a, b); inner q (clk, b, c); endmodule"""
    files |= {"a_process.sv": "module a_process (input clk); assign", f"{counts.TOP}.sv": top}
    rtl = replace(RTL, files=files)
    found = counts.synthesis(rtl, None)
    assert list(found) == [*rtl.stages, counts.JOINS]
    assert isinstance(found["multiply_process"], Cells) and found["multiply_process"].ff == 8
    assert isinstance(found[counts.JOINS], Cells) and found[counts.JOINS].ff == 8  # without what it joins
    assert found["a_process"] == "yosys failed on a_process:"
    late = counts.synthesis(rtl, None, limit=0.01)
    for name, module in (("multiply_process", "multiply_process"), (counts.JOINS, counts.TOP)):
        assert late[name] == f"yosys had not counted {module} after 0.01 s of a core"


def test_what_joins_the_processes_is_the_sum_of_its_parts() -> None:
    ends = ".clk(clk), .rst(rst), .in_data(a), .in_valid(v), .out_ready(v)"
    ends += ", .out_data(b{0}), .in_ready(r[{0}]), .out_valid(o[{0}])"
    instances = [f"  ahcq_fifo #(\n      .WIDTH({width}),\n      .DEPTH({depth})\n  ) fifo_{i} ({ends.format(i)});\n"
                 for i, (width, depth) in enumerate([(8, 2), (8, 2), (16, 4)])]  # fmt: skip
    top = (
        f"module {counts.TOP} (input clk, input rst, input v, output reg w, input [15:0] a, output [15:0] b0, b1, b2, "
    )
    top += f"output [2:0] r, output [2:0] o);\n{''.join(instances)}"
    fifo = sources("rtl", "ahcq_fifo.sv").read_text(encoding="utf-8")
    files = {"ahcq_fifo.sv": fifo, f"{counts.TOP}.sv": top + "  always @(posedge clk) w <= v;\nendmodule\n"}
    found = counts.joins(replace(RTL, files=files))
    assert found == counts.count(files, counts.TOP, without=["nothing"])  # the same at once, without flattening
    assert found.ff > 1 + 2 * (16 + 4)  # a register; of each FIFO of two bytes those, two places and a count


def test_buffers_of_the_papers_size() -> None:
    assert report.buffer_bytes(PAPER) == {"left": 2 * 2 * 1024 * 32, "right": 2 * 1024 * 64 * 4}


def test_rows_of_the_model_are_the_model() -> None:
    rows = report.model_rows(WORKLOADS, [2])
    for row, config in zip(rows, (PAPER, EngineConfig(2, 17)), strict=True):
        one, two = cycles(LAYER, config), cycles(SCORES, config)
        assert row["cycles"] == one.cycles + two.cycles and row["gmacs"] == (one.macs + two.macs) / 1e9
        assert row["without_av"] == pytest.approx(one.utilisation(config))
    for row in report.layer_rows(WORKLOADS["encoder"], PAPER):
        assert 0 < row["gmacs_per_second"] <= row["roof"] <= 307.2
    shares = [row["share"] for row in report.layer_rows(WORKLOADS["encoder"], PAPER)]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_the_page_has_the_figures_and_dashes_for_gaps(tmp_path) -> None:
    row = dict(unit="<unit>", name="fc", kind="linear", family="uniform", outputs=1234567, different_cpp=0)
    row |= dict(different_rtl=0, cycles=98, model=99)
    figures = dict(
        config="ahcq::engine::cells<1, 4>",
        matmuls=[row],
        counted="ahcq::engine::cells<2, 4>",
        processes=counts.process_rows(RTL, {"a_process": A}),
        elements=[dict(element="INT4", stages=2, lut=123, ff=45, dsp=0, fit=2228, reason=None)],
        sizes=[
            *counts.size_rows(counts.process_rows(RTL, {"a_process": A})[:-1], 2, [2, 4], 4),
            dict(cells=2, digit=17, shift_lanes=False, lut=345678, dsp=2345, bram=245.0, fits=False, how="counted"),
        ],
        engines=[dict(format="FP32", how="counted", lut=901234, dsp=2100, bram=240.0, elements=25)],
        toggles=[dict(element="FP32", gates=43210, flops=1234, changes=987.6, ratio=54.3)],
        model=report.model_rows(WORKLOADS, [2, 4]),
        layers=report.layer_rows(WORKLOADS["encoder"], PAPER),
        frames=report.frames_paragraph(481.2, 7.0, PAPER, 32.0),
    )
    data, page = report.write_report(tmp_path, figures)
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["paper"]["INT4"]["frames"] == 33.82 and found["gaps"] == list(report.GAPS)
    assert found["matmuls"][0]["cycles"] == 98
    text = page.read_text(encoding="utf-8")
    assert "307.2 GMAC/s; divided by 33.82 frames that is 9.1 GMAC a frame" in text
    assert text.count("345,678") == 2 and "901,234" in text and "987.6" in text and "54.3" in text
    assert "2,228" in text and "1,234,567" in text and "&lt;unit&gt;" in text and "177,001" in text
    assert text.count("<circle") == len(figures["layers"]) and ">multiply</span>" in text
    assert "<td>–</td>" in text and all(gap.split(",")[0] in text for gap in report.GAPS if "'" not in gap)
    assert "://" not in text  # nothing from outside
