# SPDX-License-Identifier: Apache-2.0
"""The engine with a unit for softmax as RTL: codes of the golden step, attention as one program, modelled cycles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahcq_plugin.hls.engine import rtl, simulate
from ahcq_plugin.hls.engine.compile import compile_matmul
from ahcq_plugin.hls.engine.cycles import DDR, softmax_cycles
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.program import Program, engine_forward
from ahcq_plugin.hls.engine.rtl import SMALLEST, Memory
from ahcq_plugin.hls.engine.softmax_command import Positions, compile_softmax
from ahcq_plugin.hls.rtl.simulate import Stalls
from ahcq_plugin.zoo.sam import box_forward
from tests.export.probabilities import FAMILIES
from tests.hls.engine.test_softmax_command import (
    WIDTHS,
    attention,
    differing,
    golden_codes,
    make_step,
    make_terms,
    with_terms,
)

pytestmark = pytest.mark.slow
CONFIG = dataclasses.replace(SMALLEST, softmax=True)
TWO_CELLS = dataclasses.replace(CONFIG, cells=2, left_depth=24, right_depth=48)
STALLS = [Stalls(), Stalls(0.4, 0, seed=2), Stalls(0, 0.4, seed=3), Stalls(0.2, 0.2, 300, 4)]
# (products, rows, scores of a row), bits, quantizers: tokens of a decoder, windows, the longest rows, rows of one turn
SHAPES = [
    ((8, 400, 7), 4, 1),
    ((8, 7, 400), 4, 1),
    ((8, 7, 7), 4, 1),
    ((40, 70, 9), 4, 1),
    ((1, 64, 8), 4, 1),
    ((1, 64, 64), 4, 1),
    ((3, 49, 196), 4, 3),
    ((1, 30, 1000), 6, 1),
    ((1, 8, 4096), 4, 1),
    ((2, 20, 64), 8, 1),
    ((3, 5, 33), 6, 3),
    ((1, 1, 1), 2, 1),
]
# The same with relative positions: windows of 8, 14 and 7 x 9, global attention of 32 and of 64
PICTURES = [((6, 64), (8, 8)), ((3, 100), (14, 14)), ((2, 63), (7, 9)), ((1, 40), (32, 32)), ((1, 9), (64, 64))]


def launched(
    shape: tuple[int, int, int],
    bits: int,
    quantizers: int,
    seed: int = 0,
    family: str = "lnq",
    positions: Positions | None = None,
):
    """(command, its memory, the golden codes)."""
    rng = np.random.default_rng(seed)
    octaves = (-14, 1) if positions is None else (-12 - positions.bits, -5 - positions.bits)
    step, scores = make_step(family, bits, quantizers, quantizers, rng, octaves), rng.integers(-300, 301, shape)
    image = Image()
    command = compile_softmax("softmax", step, image, CONFIG, shape, positions=positions)
    command.write_scores(image, scores)
    if positions is not None:
        terms = make_terms(shape, positions, seed)
        command.write_terms(image, *terms)
        scores = with_terms(scores, positions, *terms)
    return command, image, golden_codes(step, scores)


def test_the_unit_is_beside_the_cells_and_holds_no_cpp() -> None:
    made, plain = rtl.engine_rtl(CONFIG), rtl.engine_rtl(SMALLEST)
    added = {name.removesuffix("_process"): made.instances[name] for name in set(made.stages) - set(plain.stages)}
    once = ("share_softmax", "request_scores", "unpack_scores", "announce", "find_top", "take_differences")
    once += ("sum_powers", "take_log", "rank_codes", "pack_codes")
    assert added == {**dict.fromkeys(once, 1), "power_lane": 8}
    assert not any("DPI" in text or "import " in text for text in made.files.values())


@pytest.mark.parametrize("config", [CONFIG, TWO_CELLS], ids=["one_cell", "two_cells"])
@pytest.mark.parametrize("stalls", STALLS, ids=["none", "late", "back", "reset"])
@pytest.mark.parametrize(
    ("family", "bits", "shape"),
    [("table", 4, (17, 16, 70, 9)), ("per_head", 5, (5, 21, 7, 16)), ("uniform", 8, (33, 8, 100, 8))],
)
def test_attention_is_one_program(cases, family: str, bits: int, shape, stalls: Stalls, config) -> None:
    commands, image, wanted, codes = attention(cases, family, bits, shape, bits, config)
    before, used = image.words.copy(), 8 * image.used
    program = [command.descriptor for command in commands]
    rtl.run(image, program, config, stalls, Memory(latency=40))
    assert differing(commands, image, wanted, codes) == (0, 0)
    by_rtl = image.words[:used].copy()
    image.words[: len(before)] = before
    simulate.run(image, program, config)
    assert (by_rtl == image.words[:used]).all()


def test_a_cell_works_on_another_command_meanwhile(cases) -> None:
    """A softmax that nobody waits for, beside an attention: fewer cycles than one after the other."""
    taken = {}
    for together in (True, False):
        commands, image, wanted, codes = attention(cases, "table", 4, (33, 16, 100, 8), 1, CONFIG)
        step, scores = make_step("lnq", 4, 1, 1, np.random.default_rng(2)), np.arange(6 * 50 * 60) % 601 - 300
        other = compile_softmax("softmax", step, image, CONFIG, (6, 50, 60), barrier=not together)
        other.write_scores(image, scores)
        program = [other, commands[0], commands[1], commands[2]]
        if together:  # the first command has nothing to wait for
            first = dataclasses.replace(commands[0].descriptor, flags=commands[0].descriptor.flags & ~2)
            run = [other.descriptor, first, *(command.descriptor for command in program[2:])]
        else:
            run = [command.descriptor for command in program]
        taken[together] = rtl.run(image, run, CONFIG).cycles
        assert differing(commands, image, wanted, codes) == (0, 0)
        assert (other.read_codes(image) == golden_codes(step, scores.reshape(6, 50, 60))).all()
    assert taken[True] < 0.9 * taken[False]


def test_any_number_of_commands_may_go_without_barrier(cases) -> None:
    """More than the streams between the processes hold."""
    matmul, image = cases.make_matmul("qk", "uniform", 4, 4, 8, 8, np.random.default_rng(0)), Image()
    step = make_step("lnq", 4, 1, 1, np.random.default_rng(0))
    program = [compile_softmax("softmax", step, image, CONFIG, (1, 2, 8), barrier=False) for _ in range(12)]
    program += [compile_matmul(matmul, image, CONFIG, 2, 1, barrier=False) for _ in range(12)]
    rtl.run(image, [command.descriptor for command in program], CONFIG, limit=20_000)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    bits=st.integers(2, 8),
    heads=st.integers(1, 3),
    n=st.sampled_from(WIDTHS),
    rows=st.integers(1, 6),
    stalls=st.sampled_from(STALLS),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_the_golden_steps(family, bits, heads, n, rows, stalls, seed) -> None:
    heads = heads if heads << bits <= 256 else 1
    command, image, codes = launched((2 * heads, rows, n), bits, heads, seed, family)
    rtl.run(image, [command.descriptor], CONFIG, stalls, Memory(latency=seed % 50 + 1))
    assert (command.read_codes(image) == codes).all()


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    width=st.integers(8, 64),
    height=st.integers(1, 20),
    fraction=st.integers(0, 12),
    heads=st.integers(1, 3),
    rows=st.integers(1, 5),
    stalls=st.sampled_from(STALLS),
    seed=st.integers(0, 2**32 - 1),
)
def test_relative_positions_are_added(width, height, fraction, heads, rows, stalls, seed) -> None:
    """And not by the command behind, which has none: memories keep what they hold."""
    positions = Positions(width, height, fraction)
    command, image, codes = launched((heads, rows, width * height), 4, heads, seed, positions=positions)
    step, scores = make_step("lnq", 4, 1, 1, np.random.default_rng(seed)), np.arange(60).reshape(1, 2, 30)
    behind = compile_softmax("softmax", step, image, CONFIG, scores.shape)
    behind.write_scores(image, scores)
    rtl.run(image, [command.descriptor, behind.descriptor], CONFIG, stalls, Memory(latency=seed % 50 + 1))
    assert (command.read_codes(image) == codes).all() and (behind.read_codes(image) == golden_codes(step, scores)).all()


@pytest.mark.parametrize(("latency", "bandwidth"), [(1, 0), (60, 0), (1, 12e9)])
def test_cycles_are_those_of_the_model(latency: int, bandwidth: float) -> None:
    pictures = [((*rows, h * w), 4, 1, Positions(w, h, 4)) for rows, (h, w) in PICTURES]
    for shape, bits, quantizers, positions in [*((*one, None) for one in SHAPES), *pictures]:
        command, image, codes = launched(shape, bits, quantizers, positions=positions)
        run = rtl.run(image, [command.descriptor], CONFIG, memory=Memory(latency, bandwidth))
        assert (command.read_codes(image) == codes).all()
        ddr = DDR(bandwidth or 1e12, latency=latency - 1)
        model = softmax_cycles(shape, bits, quantizers, quantizers, ddr, positions)
        slack = 0.035 if "ddr" in model.limits else 0.02
        assert abs(run.cycles - model.cycles) <= slack * run.cycles + 48, (shape, bits, run.cycles, model)
        assert abs(run.ddr_bytes - model.ddr_bytes) <= 0.02 * run.ddr_bytes + 256, (shape, run.ddr_bytes, model)


@pytest.mark.parametrize(
    ("unit", "softmaxes"), [("mask_decoder.transformer.layers.0", 3), ("image_encoder.blocks.0", 1)]
)
def test_attention_of_a_unit_is_equal(quantized, spec, scenes, unit: str, softmaxes: int) -> None:
    """On the codes that it has on an image, on one RTL."""
    program = Program(spec, CONFIG, run=rtl.run, softmax="tables")
    _, rows = engine_forward(quantized, program, scenes[0], box_forward, [unit])
    assert len(rows) == len(spec[unit].matmuls) + softmaxes and not any(row.reason for row in rows.values())
    assert all(row.outputs for row in rows.values()) and not any(row.different for row in rows.values())
