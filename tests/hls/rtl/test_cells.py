# SPDX-License-Identifier: Apache-2.0
"""Cells that yosys counts, on designs whose cells are known."""

from __future__ import annotations

import pytest

from ahcq_plugin.hls.rtl import Program, ToolError, cells, compile_rtl

ADDER = """module adder (input clk, input [15:0] a, b, output reg [15:0] sum);
  always @(posedge clk) sum <= a + b;
endmodule
"""
RAM = """#include <ap_int.h>
#include <hls_stream.h>
void top(hls::stream<ap_uint<64> >& in, int n, hls::stream<ap_uint<64> >& out) {
    ap_uint<64> memory[1024];
    for (int i = 0; i < n; ++i) {
#pragma HLS PIPELINE II = 1
        const ap_uint<64> x = in.read();
        memory[ap_uint<10>(x)] = x;
        out.write(memory[ap_uint<10>(x >> 10)]);
    }
}
"""


def test_a_16_bit_adder_has_16_flip_flops_and_its_count_is_kept(tmp_path, monkeypatch) -> None:
    found = cells.count({"adder.sv": ADDER}, "adder", tmp_path)
    assert found == cells.Cells(lut=16, ff=16, dsp=0, bram=0.0, carry=4, logic_cells=8)
    monkeypatch.setattr(cells, "_statistics", None)  # not called again
    assert cells.count({"adder.sv": ADDER}, "adder", tmp_path) == found


def test_modules_are_counted_together_and_each_is_kept(tmp_path, monkeypatch) -> None:
    held = "module held (input clk, input [4:0] a, output reg [4:0] b); always @(posedge clk) b <= a; endmodule"
    asked, real = [], cells._statistics
    monkeypatch.setattr(cells, "_statistics", lambda files, *rest: asked.append(sorted(files)) or real(files, *rest))
    found = cells.count_each({"adder": ADDER, "held": held}, tmp_path)
    assert found["adder"] == cells.Cells(lut=16, ff=16, dsp=0, bram=0.0, carry=4, logic_cells=8)
    assert (found["held"].lut, found["held"].ff) == (0, 5)
    assert cells.count_each({"held": held}, tmp_path) == {"held": found["held"]}
    assert asked == [["adder.sv", "each.sv", "held.sv"]]


def test_what_yosys_refuses_is_an_error(tmp_path) -> None:
    with pytest.raises(ToolError, match="yosys failed on adder"):
        cells.count({"adder.sv": ADDER.replace("endmodule", "")}, "adder", tmp_path)


@pytest.mark.slow
def test_a_ram_of_64_kbit_is_two_block_rams(tmp_path) -> None:
    (tmp_path / "top.cpp").write_text(RAM, encoding="utf-8")
    rtl = compile_rtl(Program(tmp_path / "top.cpp"), "top")
    report = cells.report(rtl, tmp_path)
    assert report["total"]["bram"] == 2
    assert report["processes"]["top_process"]["bram"] == 0 and report["processes"]["top_process"]["instances"] == 1
