# SPDX-License-Identifier: Apache-2.0
"""The cycle model against the simulation, which counts the turns of every process and, clocked, the cycles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import compile_matmul
from ahcq_plugin.hls.engine.config import CHUNKS, GELUS, LANES, PAPER, WIDE, EngineConfig
from ahcq_plugin.hls.engine.cycles import DDR, Output, cycles, process_turns
from ahcq_plugin.hls.engine.destination import left_rows, shorts
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.shape import Shape

SMALL = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48)
SMALL_INT8 = EngineConfig(cells=2, digit=8, left_depth=24, right_depth=48, plane=8)
COMPACT = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48, shift_lanes=False)
FOR_EACH_CELL = ("decode", "multiply", "correct", "dequantize", "dequantize_lane", "gelu_unit", "quantize", "write")
FOR_EVER = {"multiply": CHUNKS, "dequantize_lane": LANES, "gelu_unit": GELUS}  # of a cell
# (kind, family, bits of left and right, k, n), rows, products: windows, global attention, layers, decoders
SHAPES = [
    (("linear", "uniform", 4, 4, 768, 128), 196, 1),
    (("linear", "grouped", 4, 4, 768, 128), 100, 1),
    (("linear", "hluq", 4, 4, 1024, 64), 100, 1),
    (("qk", "uniform", 4, 4, 64, 196), 196, 2),
    (("av", "table", 4, 4, 196, 64), 196, 2),
    (("qk", "uniform", 4, 4, 64, 1024), 128, 1),
    (("linear", "uniform", 4, 4, 256, 256), 7, 1),
    (("linear", "grouped", 4, 4, 256, 128), 150, 1),
    (("qk", "uniform", 4, 4, 16, 300), 7, 4),
    (("qk", "uniform", 4, 4, 16, 7), 150, 4),
    (("av", "table", 4, 4, 300, 16), 7, 2),
    (("av", "table", 4, 4, 7, 16), 150, 2),
]


def clocked(cases, shape: tuple, rows: int, batch: int, config: EngineConfig, ddr: DDR, to=None, seed: int = 0):
    """(what the simulation did, Shape) of a random matmul."""
    kind, family, *rest = shape
    matmul = cases.make_matmul(kind, family, *rest, np.random.default_rng(seed))
    image = Image()
    command = compile_matmul(matmul, image, config, rows=rows, batch=batch, destination=to)
    run = simulate.run(image, [command.descriptor], config, True, ddr_bytes_per_second=ddr.bytes_per_second)
    return run, Shape.of(matmul, rows, batch)


def check_turns(run: simulate.Run, shape: Shape, config: EngineConfig, output: Output | None = None) -> None:
    for process, turns in process_turns(shape, config, output).items():
        copies = config.cells if process in FOR_EACH_CELL else 1
        waits = copies * FOR_EVER.get(process, 0)  # the turn in which each waits for more
        assert run.turns[process] - waits == turns * copies, process


@pytest.mark.parametrize("ddr", [DDR(), pytest.param(DDR(1e12), marks=pytest.mark.slow)], ids=["12 GB/s", "no limit"])
@pytest.mark.parametrize(("shape", "rows", "batch"), SHAPES)
def test_cycles_are_those_of_the_simulation(cases, shape: tuple, rows: int, batch: int, ddr: DDR) -> None:
    for config in [PAPER] if shape[1] != "table" else [PAPER, WIDE]:
        run, launch = clocked(cases, shape, rows, batch, config, ddr)
        check_turns(run, launch, config)
        model = cycles(launch, config, ddr=ddr, stages=0)
        slack = 0.035 if "ddr" in model.limits else 0.02  # queues even out what the model takes tile by tile
        assert abs(model.cycles - run.cycles) <= slack * run.cycles + 60, model
        assert abs(model.ddr_bytes - run.ddr_bytes) <= 0.25 * run.ddr_bytes


def test_codes_and_scores_of_16_bits(cases) -> None:
    shape, ddr = ("qk", "uniform", 4, 4, 64, 192), DDR()
    run, launch = clocked(cases, shape, 192, 2, PAPER, ddr, shorts(2, 192, 192))
    model = cycles(launch, PAPER, Output(2), stages=0)
    assert abs(model.cycles - run.cycles) <= 0.02 * run.cycles + 60 and "ddr" not in model.limits
    assert cycles(launch, PAPER).limits["ddr"] > 0.9 * cycles(launch, PAPER).cycles  # floats
    operand = cases.specs.make_left("uniform", 6, 4, np.random.default_rng(0))
    shape = ("linear", "uniform", 4, 4, 64, 64)
    for activation, output in (("", Output(1, 6)), ("gelu", Output(1, 6, gelu=True))):
        run, launch = clocked(cases, shape, 300, 1, PAPER, ddr, left_rows(300, 64, operand, activation=activation))
        check_turns(run, launch, PAPER, output)
        model = cycles(launch, PAPER, output, stages=0)
        assert abs(model.cycles - run.cycles) <= 0.03 * run.cycles + 60
    assert model.limits["output"] > 0.9 * model.cycles  # 32 turns of two GELUs for 8 of the cells


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="nibbles"),
        pytest.param(COMPACT, id="compact"),
        pytest.param(SMALL_INT8, id="int8", marks=pytest.mark.slow),
    ],
)
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    kind=st.sampled_from(
        [("linear", "uniform"), ("linear", "grouped"), ("linear", "hluq"), ("qk", "uniform"), ("av", "table")]
    ),
    bits=st.integers(2, 8),
    right_bits=st.integers(2, 8),
    k=st.integers(1, 100),
    n=st.integers(1, 140),
    rows=st.integers(1, 40),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_turns_of_any_matmul(cases, config, kind, bits, right_bits, k, n, rows, batch, seed) -> None:
    image, batch = Image(), 1 if kind[0] == "linear" else batch
    matmul = cases.make_matmul(*kind, bits, right_bits, k, n, np.random.default_rng(seed))
    command = compile_matmul(matmul, image, config, rows=rows, batch=batch)
    run = simulate.run(image, [command.descriptor], config)
    check_turns(run, Shape.of(matmul, rows, batch), config)


def test_utilisation_counts_a_multiplication_once(cases) -> None:
    shape = Shape("av", "table", 4, 4, 2**16, 0, (4096,), 1, 12, 4096, 64)
    nibbles, wide = cycles(shape, PAPER), cycles(shape, WIDE)
    assert nibbles.macs == wide.macs == 12 * 4096 * 4096 * 64
    assert 0.19 < nibbles.utilisation(PAPER) < 0.2  # 17 bits in five passes
    assert wide.utilisation(WIDE) > 0.97
    eight = dataclasses.replace(shape, family="uniform", left_top=255, left_bits=8)
    assert cycles(eight, PAPER).utilisation(PAPER) == pytest.approx(0.5, abs=0.01)
