# SPDX-License-Identifier: Apache-2.0
"""``row_cycles`` against the kernels themselves: how often the pipelined loops of each stage turn for one more row."""

from __future__ import annotations

import ctypes
import dataclasses
import json

import numpy as np
import pytest

from ahcq_plugin.hls import HLSOptions, Layer, compile_generated, generate
from ahcq_plugin.hls.vectors import make_vectors

PIPELINE = "#pragma HLS PIPELINE II = 1\n"  # such a loop starts a turn every cycle
STAGES = {"send": ("rows.h",), "multiply": ("linear.h", "attention.h"), "dequantize": ("dequantize.h",)}
COUNTERS = """
inline long turns[3] = {0, 0, 0};
extern "C" __attribute__((used)) inline long* ahcq_turns() { return turns; }
"""
# name -> (layer, its options, the stage that is slowest)
LAYERS = {
    "narrow_result": ("uniform", HLSOptions(pe=10, simd=8, out=1), "dequantize"),  # 10 numbers, 3 folds
    "wide_result": ("uniform", HLSOptions(pe=10, simd=4, out=10), "multiply"),
    "groups_are_drained_one_by_one": ("grouped", HLSOptions(pe=9, simd=8, out=1), "dequantize"),
    "groups_are_put_in_order_first": ("grouped", HLSOptions(pe=4, simd=2, out=4), "send"),
    "two_lanes": ("hluq", HLSOptions(pe=8, simd=8, out=2), "dequantize"),
    "table": ("table", HLSOptions(pe=4, simd=2, out=2), "multiply"),
    "product": ("qk", HLSOptions(pe=8, simd=8, out=2), "dequantize"),
    "product_with_a_table": ("av_table", HLSOptions(pe=8, simd=4, out=4), "multiply"),
}


@pytest.fixture(scope="module")
def counted(cases, tmp_path_factory):
    """name -> (Layer, row_cycles in layers.json, turns of each stage for one more row)."""
    layers = {}
    for name, (case, options, _) in LAYERS.items():
        layer = cases.make_layer(case)
        layers[name] = dataclasses.replace(layer, matmul=dataclasses.replace(layer.matmul, name=name), options=options)
    folder = generate(list(layers.values()), tmp_path_factory.mktemp("cycles") / "layers")
    kernels = folder / "include" / "ahcq"
    for stage, files in enumerate(STAGES.values()):
        for file in files:
            text = (kernels / file).read_text(encoding="utf-8")
            assert PIPELINE in text
            (kernels / file).write_text(text.replace(PIPELINE, f"++turns[{stage}];\n"), encoding="utf-8")
    beats = (kernels / "beats.h").read_text(encoding="utf-8")
    text = beats.replace("namespace ahcq {\n", f"namespace ahcq {{\n{COUNTERS}", 1)
    (kernels / "beats.h").write_text(text, encoding="utf-8")
    functions = compile_generated(list(layers.values()), folder)
    entries = json.loads((folder / "layers.json").read_text(encoding="utf-8"))["layers"]
    measured = {entry["top"]: entry["row_cycles"] for entry in entries}
    return {name: (layer, measured[layer.top], one_more_row(functions[layer.top])) for name, layer in layers.items()}


def one_more_row(function) -> dict[str, int]:
    library = function._library
    library.ahcq_turns.restype = ctypes.POINTER(ctypes.c_long * len(STAGES))
    turns = library.ahcq_turns().contents
    counts = []
    for rows in (2, 3):
        before = np.array(turns)
        vectors = make_vectors(function.layer.matmul, 1, rows, seed=0)
        function.run(vectors.left, vectors.right, accumulators=False)
        counts.append(np.array(turns) - before)
    return dict(zip(STAGES, (counts[1] - counts[0]).tolist(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_row_cycles_are_those_of_the_slowest_stage(counted, name: str) -> None:
    layer, row_cycles, turns = counted[name]
    assert row_cycles == max(turns.values())
    assert layer.layout.stage_cycles == turns
    assert turns[LAYERS[name][2]] == row_cycles


def test_the_default_size_waits_for_its_result(cases) -> None:
    """128 processing elements give 4 floats a beat: 32 cycles a tile, 8 more than the 24 folds of K = 192."""
    matmul = cases.make_matmul("linear", "uniform", 4, 4, 192, 256, np.random.default_rng(0))
    assert Layer("", matmul, HLSOptions(pe=128, simd=8, out=4)).layout.row_cycles == 2 * 32
    assert Layer("", matmul, HLSOptions(pe=128, simd=8, out=8)).layout.row_cycles == 2 * 24
