# SPDX-License-Identifier: Apache-2.0
"""The elements on instantiated DSPs: equal to numpy and, turn for turn, to what XLS makes of the C++, their twin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ahcq_plugin.hls.engine import multiply
from ahcq_plugin.hls.engine.config import INT8, LANES, PAPER, WIDE, EngineConfig
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, Rtl, RtlError, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.cells import count
from ahcq_plugin.hls.rtl.simulate import Simulation, Stalls, build

STALLS = [Stalls(), Stalls(0.4, 0.0, seed=2), Stalls(0.0, 0.6, seed=3), Stalls(0.3, 0.3, 200, 4)]
SOURCE = """#include "ahcq/engine/cell.h"
using namespace ahcq::engine;
typedef {config} config;
void top(
    hls::stream<operands<config> >& left,
    hls::stream<right_columns<config> >& right,
    hls::stream<sums<config> >& out) {{
#pragma HLS DATAFLOW
    multiply<config>(left, right, out);
}}
"""
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        pytest.param(PAPER, id="int4"),
        pytest.param(WIDE, id="wide", marks=pytest.mark.slow),
        pytest.param(INT8, id="int8", marks=pytest.mark.slow),
        pytest.param(replace(PAPER, digit=8, right_depth=48), id="digits of 8 bits", marks=pytest.mark.slow),
        pytest.param(replace(PAPER, digit=11, right_depth=1), id="digits of 11 bits", marks=pytest.mark.slow),
    ],
)


def made(config: EngineConfig, folder: Path, text=None) -> Rtl:
    source = folder / "elements.cpp"
    source.write_text(SOURCE.format(config=config.cpp), encoding="utf-8")
    modules = None if text is None else {multiply.NAME: text}
    return compile_rtl(Program(source, (sources("include"),)), "top", cache=cache_folder(), modules=modules)


def simulated(rtl: Rtl) -> Simulation:
    rtl.files[multiply.MODEL] = sources("rtl", "pe", multiply.MODEL).read_text(encoding="utf-8")
    return build(rtl, cache_folder())


def turns(config: EngineConfig, count: int, seed: int):
    """Words of both streams and the sums that numpy has; the largest operands are among them."""
    rng = np.random.default_rng(seed)
    shifts = LANES if config.plane == 4 else 0
    digits = rng.integers(0, 2**config.digit, (count, LANES))
    powers = np.where(rng.random((count, shifts)) < 0.3, 0, 2 ** rng.integers(0, 16, (count, shifts)))
    codes = rng.integers(0, 2**config.plane, (count, LANES, LANES))  # columns, inputs
    digits[:64], powers[:64], codes[:64] = 2**config.digit - 1, 2**15, 2**config.plane - 1
    begins, gives = rng.random((2, count)) < 0.3
    # no pass is longer than the right buffer, and none so long that 31 bits do not hold what is shifted
    begins[:: min(config.right_depth, 512)] = True
    products = np.einsum("ti,tci->tc", digits, codes)
    shifted = np.einsum("ti,tci->tc", powers, codes) if shifts else np.zeros((count, 0), int)
    folds, sums, wanted = np.concatenate([products, shifted], 1), 0, []
    for turn in range(count):
        sums = folds[turn] + (0 if begins[turn] else sums)
        wanted += [sums] if gives[turn] else []
    word = np.uint8 if config.digit <= 8 else np.uint32
    dtype = np.dtype(
        [("digit", word, LANES), ("power", np.uint16, shifts or 1), ("begins", "?"), ("gives", "?")], align=True
    )
    left = np.zeros(count, dtype)
    left["digit"], left["begins"], left["gives"] = digits, begins, gives
    if shifts:
        left["power"] = powers
    places = config.plane * np.arange(LANES)
    right = (codes.astype(np.uint64) << places.astype(np.uint64)).sum(2, dtype=np.uint64)
    right = right.astype("<u4" if config.plane == 4 else "<u8")
    numbers = [[int.from_bytes(one.tobytes(), "little") for one in side] for side in (left, right)]
    return dict(zip(("left", "right"), numbers, strict=True)), np.array(wanted, np.uint64)


def differing(simulation: Simulation, config: EngineConfig, stalls: Stalls, count: int = 4000) -> int:
    words, wanted = turns(config, count, stalls.seed)
    try:
        found = simulation.run(words, {"out": len(wanted)}, stalls, limit=100 * count).outputs["out"]
    except RtlError:  # some never came
        return count
    if len(found) != len(wanted):  # more came in the last cycle
        return abs(len(found) - len(wanted))
    found = np.ascontiguousarray(found).view(np.uint32 if config.accumulator_bits == 32 else np.uint64)
    return int((found[:, : wanted.shape[1]] != wanted).sum()) + int(found[:, wanted.shape[1] :].sum())


@CONFIGS
def test_sums_are_those_of_numpy_and_of_the_twin(tmp_path: Path, config: EngineConfig) -> None:
    for rtl in (made(config, tmp_path, partial(multiply.module_text, config)), made(config, tmp_path)):
        simulation = simulated(rtl)
        for stalls in STALLS:
            assert differing(simulation, config, stalls) == 0, stalls


def test_a_turn_a_cycle_after_as_many_stages_as_are_said(tmp_path: Path) -> None:
    simulation = simulated(made(PAPER, tmp_path, partial(multiply.module_text, PAPER)))
    words, _ = turns(PAPER, 1000, 5)
    gives = {port: [*given[:1000]] for port, given in words.items()}
    gives["left"][-1] |= 1 << (8 * LANES + 16 * LANES + 8)  # the last turn gives its sums
    count = sum(word >> (8 * LANES + 16 * LANES + 8) & 1 for word in gives["left"])
    # from the first word in to the last one out; no FIFO is between the ports of this top and the process
    assert simulation.run(gives, {"out": count}).cycles == 1000 + multiply.stages(PAPER)


@pytest.mark.parametrize(
    ("config", "dsp", "luts"),
    [
        pytest.param(PAPER, 56, 800, id="int4"),
        pytest.param(WIDE, 96, 1000, id="wide", marks=pytest.mark.slow),
        pytest.param(INT8, 32, 800, id="int8", marks=pytest.mark.slow),
    ],
)
def test_products_are_in_dsps(tmp_path: Path, config: EngineConfig, dsp: int, luts: int) -> None:
    """Three columns of nibbles to a DSP, two of 8-bit codes, two of shifted codes; LUTs for accumulators and delays."""
    process = next(iter(made(config, tmp_path).design.processes.values()))
    cells = count({"module.sv": multiply.module_text(config, process)}, multiply.NAME, cache_folder())
    assert cells.dsp == dsp and cells.lut <= luts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("k <= i % CHAIN", "k < i % CHAIN"),
        ("(begins[STAGES-1] ? '0 : sum) + fold", "(begins[STAGES-2] ? '0 : sum) + fold"),
        ("SHIFT_FIELD = 22", "SHIFT_FIELD = 21"),
        ("FIELD = DIGIT + CODE + $clog2(CHAIN)", "FIELD = DIGIT + CODE + 2"),
        ("fire = enable && left_valid", "fire = left_valid"),
        ("valid[STAGES-1] && gives[STAGES-1]", "gives[STAGES-1]"),
        (".CEM(enable)", ".CEM(1'b1)"),
        ("codes[column*FIELD+:CODE]", "codes[column*(FIELD-1)+:CODE]"),
    ],
)
def test_a_fault_in_it_is_seen(tmp_path: Path, text: str, faulty: str) -> None:
    def planted(process) -> str:
        module = multiply.module_text(PAPER, process)
        assert text in module
        return module.replace(text, faulty)

    assert any(differing(simulated(made(PAPER, tmp_path, planted)), PAPER, stalls) for stalls in STALLS)
