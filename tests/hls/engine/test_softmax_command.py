# SPDX-License-Identifier: Apache-2.0
"""Softmax as a command: scores of 16 bits in the engine's memory to codes as A.V reads them, as the golden step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import SpecError, golden
from ahcq_plugin.export.table_softmax import TableSoftmax
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import Command, compile_matmul
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.destination import shorts
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.layouts import planes_of
from ahcq_plugin.hls.engine.softmax_command import Positions, SoftmaxCommand, compile_softmax, find_positions
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, cache_folder, compile_rtl
from ahcq_plugin.hls.vectors import make_vectors
from tests.export.probabilities import FAMILIES, make_quantizer

TWO = EngineConfig(softmax=True)
WIDTHS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100]


def make_step(family: str, bits: int, heads: int, quantizers: int, rng: np.random.Generator, octaves=(-14, 1)):
    """A ``TableSoftmax`` of ``heads`` heads, with bounds of their own if ``quantizers`` is ``heads``.

    ``octaves``: of the scales, least and most.
    """
    scales = 2.0 ** rng.uniform(*octaves, heads)
    made = [TableSoftmax.of(scales, make_quantizer(family, bits, rng)) for _ in range(quantizers)]
    return dataclasses.replace(made[0], bounds=np.concatenate([one.bounds for one in made]))


def golden_codes(step: TableSoftmax, scores: np.ndarray) -> np.ndarray:
    heads = np.arange(len(scores)) % len(step.mantissas)
    return step.run(scores, np.broadcast_to(heads[:, None], scores.shape[:2]))


def attention(cases, family: str, bits: int, shape: tuple[int, int, int, int], seed: int, config=TWO):
    """(commands Q.K^T, softmax, A.V, their memory, floats of A.V by the golden steps, codes by the golden step).

    ``shape``: rows, channels of a head, tokens, channels of a value; ``family`` of the quantizer, per_head of all.
    """
    rows, size, tokens, width = shape
    rng = np.random.default_rng(seed)
    heads, right = (3, "per_head") if family == "per_head" else (1, "uniform")
    scores = cases.make_matmul("qk", right, 4, 4, size, tokens, rng, right)
    values = cases.make_matmul("av", family, bits, 4, tokens, width, rng)
    scale = np.float32(2 / tokens / (2**bits - 1))  # for probabilities about 1 / tokens
    change = dict(
        table=dict(boundaries=np.sort(rng.uniform(0, 2 / tokens, 2**bits - 1)).astype(np.float32)),
        uniform=dict(scale=scale, zero_point=0),
        per_head=dict(scales=scale * np.arange(1, 4, dtype=np.float32), zero_points=np.array([0, 0, 1])),
    )
    values = dataclasses.replace(values, left=dataclasses.replace(values.left, **change[family]))
    step = TableSoftmax.of(2.0 ** rng.uniform(-11, -6, heads), values.left)
    batch, image = 2 * heads, Image()
    given = make_vectors(scores, batch, rows, seed)
    first = compile_matmul(scores, image, config, rows, batch, shorts(batch, rows, tokens, heads))
    second = compile_softmax("softmax", step, image, config, (batch, rows, tokens), first.descriptor.out)
    third = compile_matmul(values, image, config, rows, batch, left=second.descriptor.out)
    first.write_left(image, given.left)
    first.write_right(image, given.right)
    v = make_vectors(values, batch, rows, seed).right
    third.write_right(image, v)
    wanted_scores = golden.run(scores, given.left, given.right).accumulators[..., 0]
    codes = golden_codes(step, wanted_scores)
    return (first, second, third), image, golden.run(values, codes, v).output, codes


def differing(commands: tuple[Command, SoftmaxCommand, Command], image: Image, wanted, codes) -> tuple[int, int]:
    """How many codes, and floats of A.V, differ in any bit."""
    _, second, third = commands
    floats = third.read_output(image)
    return int((second.read_codes(image) != codes).sum()), int((floats.view(np.uint32) != wanted.view(np.uint32)).sum())


def make_terms(shape: tuple[int, int, int], positions: Positions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Terms of rows (batch, m, height) and of columns (batch, m, width) of the picture of keys."""
    rng, most = np.random.default_rng(seed), 300 << positions.bits
    return tuple(rng.integers(-most, most + 1, (*shape[:2], side)) for side in (positions.height, positions.width))


def with_terms(scores: np.ndarray, positions: Positions, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    picture = (scores << positions.bits).reshape(*scores.shape[:2], positions.height, positions.width)
    return (picture + rows[..., None] + columns[..., None, :]).reshape(scores.shape)


def wrong(step: TableSoftmax, scores: np.ndarray, config: EngineConfig, positions: Positions | None = None) -> int:
    """Codes that are not the golden step's, and words elsewhere that are not 0, or not what they were."""
    image = Image()
    command = compile_softmax("softmax", step, image, config, scores.shape, positions=positions)
    command.write_scores(image, scores)
    if positions is not None:
        terms = make_terms(scores.shape, positions, seed=1)
        command.write_terms(image, *terms)
        scores = with_terms(scores, positions, *terms)
    before, d = image.words.copy(), command.descriptor
    simulate.run(image, [d], config)
    rows = image.read(d.out, command.words).reshape(d.batch * d.m, -1)
    behind = rows[:, -(-d.n // 8) * planes_of(d.out_bits) :]
    changed = image.words[: 8 * d.out] != before[: 8 * d.out]
    return int((command.read_codes(image) != golden_codes(step, scores)).sum() + (behind != 0).sum() + changed.sum())


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    bits=st.integers(2, 8),
    heads=st.integers(1, 3),
    of_heads=st.booleans(),
    n=st.sampled_from(WIDTHS),
    rows=st.integers(1, 6),
    spread=st.sampled_from([0, 5, 300, 2**15 - 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_the_golden_steps(family, bits, heads, of_heads, n, rows, spread, seed) -> None:
    rng = np.random.default_rng(seed)
    step = make_step(family, bits, heads, heads if of_heads and heads << bits <= 256 else 1, rng)
    assert wrong(step, rng.integers(-spread, spread + 1, (2 * heads, rows, n)), TWO) == 0


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    width=st.integers(8, 64),
    height=st.integers(1, 64),
    fraction=st.integers(0, 12),
    heads=st.integers(1, 3),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_relative_positions_are_added(width, height, fraction, heads, rows, seed) -> None:
    rng = np.random.default_rng(seed)
    step = make_step("lnq", 4, heads, 1, rng, (-12 - fraction, -5 - fraction))  # most codes occur
    positions = Positions(width, height, fraction)
    scores = rng.integers(-300, 301, (heads, rows, width * height))
    assert wrong(step, scores, TWO, positions) == 0


@given(width=st.integers(8, 64), height=st.integers(1, 64), bits=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_terms_of_rows_and_columns_are_found_in_those_of_scores(width, height, bits, seed) -> None:
    zeros, positions = np.zeros((2, 3, width * height), np.int64), Positions(width, height, bits)
    rows, columns = make_terms(zeros.shape, positions, seed)
    terms = (with_terms(zeros, positions, rows, 0 * columns), with_terms(zeros, positions, 0 * rows, columns))
    found, *parts = find_positions(terms, bits)  # several pictures may tell the same
    assert found.width * found.height == width * height and found.bits == bits
    assert (with_terms(zeros, found, *parts) == terms[0] + terms[1]).all()


def test_terms_that_the_unit_cannot_add_say_why() -> None:
    ones, rng = np.ones((1, 1, 64), np.int64), np.random.default_rng(0)
    for terms, message in (
        ((rng.integers(0, 9, (1, 1, 64)),) * 2, "not of rows and columns"),
        ((np.repeat(rng.permutation(64)[None, None, :32], 2, -1), np.tile([3, 5], 32)[None, None]), "of 32 x 2, the"),
        ((ones << 29, 0 * ones), "its terms have 30 bits, the engine adds 29"),
    ):
        with pytest.raises(SpecError, match=message):
            find_positions(terms, 4)


def test_the_longest_rows_and_the_lowest_and_highest_scores() -> None:
    step = make_step("lnq", 4, 1, 1, np.random.default_rng(0))
    scores = np.random.default_rng(1).integers(-(2**15), 2**15, (1, 3, 4096))
    assert wrong(step, scores, dataclasses.replace(PAPER, softmax=True)) == 0


@pytest.mark.parametrize(
    ("family", "bits"),  # 256 bounds hold three quantizers of at most 6 bits
    [
        (family, bits)
        for family in ("table", "uniform", "per_head")
        for bits in (2, 4, 5, 8)
        if (family, bits) != ("per_head", 8)
    ],
)
@pytest.mark.parametrize("shape", [(17, 16, 70, 9), (5, 21, 7, 16), (33, 8, 100, 8)])
def test_attention_is_one_program(cases, family: str, bits: int, shape: tuple[int, int, int, int]) -> None:
    """Scores and codes never leave the memory; the heads' own scales and zero points reach all three commands."""
    commands, image, wanted, codes = attention(cases, family, bits, shape, seed=bits)
    simulate.run(image, [command.descriptor for command in commands], TWO)
    assert len(np.unique(codes)) > 2 and differing(commands, image, wanted, codes) == (0, 0)


def test_cells_work_on_other_commands_meanwhile(cases) -> None:
    """Without BARRIER: four softmaxes between two attentions, which wait for all of them."""
    commands, image, wanted, codes = attention(cases, "table", 4, (17, 16, 70, 9), 1)
    rng = np.random.default_rng(2)
    step, scores = make_step("lnq", 4, 1, 1, rng), rng.integers(-300, 300, (4, 3, 20, 50))
    others = [compile_softmax("softmax", step, image, TWO, (3, 20, 50), barrier=False) for _ in scores]
    for other, values in zip(others, scores, strict=True):
        other.write_scores(image, values)
    program = [commands[0], *others, commands[1], commands[2]]
    simulate.run(image, [command.descriptor for command in program], TWO)
    assert differing(commands, image, wanted, codes) == (0, 0)
    for other, values in zip(others, scores, strict=True):
        assert (other.read_codes(image) == golden_codes(step, values)).all()


def test_any_number_of_commands_may_go_without_barrier(cases) -> None:
    """More than the streams between the processes hold."""
    image, rng = Image(), np.random.default_rng(0)
    step, matmul = make_step("lnq", 4, 1, 1, rng), cases.make_matmul("qk", "uniform", 4, 4, 8, 8, rng)
    program = [compile_softmax("softmax", step, image, TWO, (1, 2, 8), barrier=False) for _ in range(40)]
    program += [compile_matmul(matmul, image, TWO, 2, 1, barrier=False) for _ in range(40)]
    simulate.run(image, [command.descriptor for command in program], TWO, clocked=True)


@pytest.mark.parametrize(
    ("bits", "quantizers", "shape", "config", "message"),
    [
        (4, 1, (2, 1, 4097), TWO, "softmax_1.*scores of a row: got 4097, at most 4096"),
        (8, 2, (2, 1, 8), TWO, "bounds of the codes: got 512, at most 256"),
        (4, 1, (3, 1, 8), TWO, "products of 2 heads"),
        (4, 1, (2, 1, 0), TWO, "none 0"),
        (4, 1, (2, 1, 8), PAPER, "no unit for it.*softmax=True"),
    ],
)
def test_what_does_not_fit_is_refused(bits, quantizers, shape, config, message) -> None:
    step = make_step("lnq", bits, 2, quantizers, np.random.default_rng(0))
    with pytest.raises(SpecError, match=message):
        compile_softmax("softmax_1", step, Image(), config, shape)


# (file, text, faulty text)
MUTANTS = [
    ("softmax_unit.h", "/ (2 * BEAT_SCORES) * 2", "/ BEAT_SCORES"),
    ("softmax_unit.h", "(c.n + BEAT_SCORES - 1) / BEAT_SCORES", "c.n / BEAT_SCORES + 1"),
    ("softmax_unit.h", "factor_beats(c) + rank_beats(c) :", "rank_beats(c) :"),
    ("softmax_unit.h", "first ? job.parameters : terms", "first ? address : terms"),
    ("softmax_unit.h", "terms = term_beats != 0 && !terms", "terms = first && term_beats != 0"),
    ("softmax_unit.h", "next_row = key_row + 1", "next_row = key_row"),
    ("softmax_unit.h", "key_column + lane < job.width", "key_column + lane <= job.width"),
    ("softmax_unit.h", "key_column + LANES - job.width :", "key_column + LANES - job.width + 1 :"),
    ("softmax_unit.h", "column_beat + 1 == job.column_beats", "column_beat == job.column_beats"),
    ("softmax_unit.h", "<< (job.fraction % 16)", "<< (job.fraction % 8)"),
    ("softmax_unit.h", "upper = now.beat % 2 != 0", "upper = false"),
    ("softmax_unit.h", "upper ? LANES / 2 + lane / 2", "upper ? lane / 2"),
    ("softmax_unit.h", "int32_t(int16_t(pair >> (16 * (lane % 2))))", "int32_t(uint16_t(pair >> (16 * (lane % 2))))"),
    ("softmax_unit.h", "c.out_bits > 4", "c.out_bits > 5"),
    ("softmax_unit.h", "place == 0 ? 0 : request.data", "request.data"),
    ("softmax_unit.h", "ends_row(c, now) || place", "place"),
    ("softmax_unit.h", "request.address += LANES", "request.address += 1"),
    ("softmax_unit.h", "job.command.heads = c.heads", "job.command.heads = 1"),
    ("softmax_unit.h", "job.command.quantizers = c.quantizers", "job.command.quantizers = 1"),
    ("fetch.h", "softmaxes != 0 && (waits", "softmaxes != 0 && (issued"),
    ("fetch.h", "++state.softmaxes;", "++state.running;"),
]  # fmt: skip


def faults_cases() -> list[tuple[TableSoftmax, np.ndarray, Positions | None]]:
    """Rows of whole and of broken beats, of heads, of 4 and of 8 bits, with positions and without."""
    rng = np.random.default_rng(0)
    sizes = ((4, 3, 1, (6, 5, 64)), (4, 3, 3, (3, 4, 100)), (5, 1, 1, (1, 6, 70)), (8, 1, 1, (2, 5, 40)))
    made = [
        (make_step("lnq", bits, heads, quantizers, rng), rng.integers(-300, 301, shape), None)
        for bits, heads, quantizers, shape in sizes
    ]
    for positions in (Positions(14, 14, 2), Positions(8, 5, 12)):
        step = make_step("lnq", 4, 1, 1, rng, (-9 - positions.bits, -8 - positions.bits))
        made.append((step, rng.integers(-300, 301, (1, 3, positions.width * positions.height)), positions))
    return made


def test_the_cases_of_the_faults_pass() -> None:
    assert not any(wrong(*case, TWO, positions) for *case, positions in faults_cases())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "faulty"), MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_fault_is_seen(cases, plant, name: str, text: str, faulty: str) -> None:
    plant(name, text, faulty)
    simulate.library.cache_clear()
    try:
        seen = bool(sum(wrong(*case, TWO, positions) for *case, positions in faults_cases()))
        for given in (("table", 4, (17, 16, 70, 9)), ("per_head", 5, (5, 21, 7, 16))):
            commands, image, wanted, codes = attention(cases, *given, seed=3)
            simulate.run(image, [command.descriptor for command in commands], TWO)
            seen = seen or differing(commands, image, wanted, codes) != (0, 0)
    except RuntimeError:
        seen = True
    finally:
        simulate.library.cache_clear()
    assert seen


TOP = """#include "ahcq/engine/softmax_unit.h"
using namespace ahcq::engine;
void unit_rtl(
    hls::stream<command>& commands,
    hls::stream<read_request>& requests,
    hls::stream<beat>& beats,
    hls::stream<write_request>& results,
    hls::stream<bool>& written,
    hls::stream<bool>& done) {
#pragma HLS DATAFLOW
    softmax_unit(commands, requests, beats, results, written, done);
}
"""


def test_every_process_makes_a_turn_a_cycle(tmp_path: Path) -> None:
    """Or there would be no RTL; no fault that the linter knows."""
    (tmp_path / "unit.cpp").write_text(TOP)
    rtl = compile_rtl(Program(tmp_path / "unit.cpp", (sources("include"),)), "unit_rtl", cache=cache_folder())
    joining = ("share_softmax", "request_scores", "unpack_scores", "pack_codes")
    assert {f"{name}_process" for name in joining} < set(rtl.scheduled) and len(rtl.scheduled) == 4 + 7
