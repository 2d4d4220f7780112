# SPDX-License-Identifier: Apache-2.0
"""The estimate of energy: gates compute what the RTL computes, and changes of nets are those that can be counted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ahcq_plugin.hls.engine import toggles
from ahcq_plugin.hls.engine.toggles import FORMATS, codes, element_run, packaged_rows
from ahcq_plugin.hls.rtl import ToolError, cache_folder
from ahcq_plugin.hls.rtl.gates import STREAMS, gates, of_streams, to_streams

COUNTER = """module counter (input clk, input rst, input [3:0] a, output reg [7:0] sum, output [7:0] square);
  always @(posedge clk) if (rst) sum <= 0; else sum <= sum + a;
  assign square = a * a;
endmodule
"""
DELAY = "module delay (input clk, input a, output reg q); always @(posedge clk) q <= a; endmodule"
WEIGHTS = 1 << np.arange(8)


def bits(values: np.ndarray, count: int) -> np.ndarray:
    return to_streams((values[..., None] >> np.arange(count) & 1).astype(np.uint8))


def test_gates_compute_what_the_module_computes() -> None:
    made, a = gates(COUNTER, "counter"), np.random.default_rng(0).integers(0, 16, (STREAMS, 50))
    reset = np.zeros((50, 1), np.uint64)
    reset[[0, 1, 20]] = 2**64 - 1
    inputs = dict(a=bits(a, 4), rst=reset, clk=np.zeros_like(reset))
    found, _ = made.run(inputs, ("sum", "square"), 1)
    sums = np.zeros_like(a)
    for cycle in range(1, 50):
        sums[:, cycle] = 0 if reset[cycle - 1, 0] else (sums[:, cycle - 1] + a[:, cycle - 1]) % 256
    assert ((of_streams(found["sum"]) * WEIGHTS).sum(-1) == sums).all()
    assert ((of_streams(found["square"]) * WEIGHTS).sum(-1) == a * a).all()


def test_changes_are_those_of_every_net_after_the_warm_cycles() -> None:
    made, a = gates(DELAY, "delay"), np.random.default_rng(1).integers(0, 2, (STREAMS, 40))
    found, changes = made.run(dict(a=bits(a, 1), clk=np.zeros((40, 1), np.uint64)), ("q",), 10)
    assert (of_streams(found["q"])[:, 1:, 0] == a[:, :-1]).all()
    flips = np.abs(np.diff(a, axis=1))  # the net a in cycle i + 1, q a cycle later
    assert changes == flips[:, 9:].sum() + flips[:, 8:-1].sum()


@pytest.mark.parametrize(
    ("body", "words"),
    [("assign q = a & ~q;", "a circle of"), ("always @* if (a) q = b;", "yosys failed on odd")],
    ids=["circle", "latch"],
)
def test_what_is_no_synchronous_module_is_refused(body: str, words: str) -> None:
    kind = "reg" if "always" in body else "wire"
    with pytest.raises(ToolError, match=words):
        gates(f"module odd (input a, input b, output {kind} q); {body} endmodule", "odd")


def test_flip_flops_that_begin_with_1_do_so() -> None:
    text = "module one (input clk, input a, output reg q = 1); always @(posedge clk) q <= a; endmodule"
    never = np.zeros((3, 1), np.uint64)
    found, _ = gates(text, "one").run(dict(a=never, clk=never), ("q",), 1)
    assert (found["q"][:, 0] == np.array([2**64 - 1, 0, 0], np.uint64)).all()


def test_codes_keep_zero_and_both_ends() -> None:
    x = np.array([[-1.0, 0.0, 3.0]], np.float32)
    assert codes(x, 4).tolist() == [[0, 4, 15]] and codes(x, 8).tolist() == [[0, 64, 255]]


def test_rows_are_kept_by_what_determines_them(tmp_path, monkeypatch) -> None:
    rng, asked = np.random.default_rng(3), []

    def run(number, left, right, cache, limit):
        asked.append(number)
        return None, dict(element=number, gates=1, flops=1, changes=2.0 * len(asked))

    monkeypatch.setattr(toggles, "element_run", run)
    monkeypatch.setattr(toggles, "element_rtl", lambda number, cache: SimpleNamespace(files={"element.sv": number}))
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 24), (STREAMS, 24)))
    rows = toggles.toggle_rows(x, weight, tmp_path)
    assert [row["ratio"] for row in rows] == [1, 2, 3] and asked == list(FORMATS)
    assert toggles.toggle_rows(x, weight, tmp_path) == rows and len(asked) == 3
    toggles.toggle_rows(2 * x, weight, tmp_path)  # the same codes, other floats
    assert asked == [*FORMATS, "FP32"]


@pytest.mark.slow
@pytest.mark.parametrize("number", FORMATS)
def test_elements_as_gates_have_the_sums_of_numpy(number: str) -> None:
    rng, width = np.random.default_rng(2), FORMATS[number]
    shapes = ((16, 24), (STREAMS, 24))
    if width is None:
        left, right = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        p = (left[:, None] * right).reshape(16, STREAMS, 3, 8).transpose(3, 2, 0, 1)
        trees = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
        wanted = (trees[0] + trees[1]) + trees[2]
    else:
        left, right = (rng.integers(0, 2**width, shape).astype(np.uint8) for shape in shapes)
        wanted = left.astype(np.uint32) @ right.T.astype(np.uint32)
    found, row = element_run(number, left, right, cache_folder())
    assert found.dtype == wanted.dtype and (found.view(np.uint32) == wanted.view(np.uint32)).all()
    assert 0 < row["changes"] < row["gates"] + row["flops"] + 600


@pytest.mark.slow
def test_more_bits_change_more_nets() -> None:
    rows = packaged_rows(cache_folder())
    assert [row["element"] for row in rows] == list(FORMATS)
    assert rows[0]["ratio"] == 1 < rows[1]["ratio"] < rows[2]["ratio"]
