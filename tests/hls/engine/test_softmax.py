# SPDX-License-Identifier: Apache-2.0
"""The softmax of the engine: its C++ and its RTL give the codes of the golden step, bit for bit."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import SpecError
from ahcq_plugin.export.compare import table_softmax_forward
from ahcq_plugin.export.table_softmax import MASKED, TableSoftmax
from ahcq_plugin.hls.engine import softmax
from ahcq_plugin.hls.engine.softmax import SoftmaxLaunch, joined, parted, render_softmax_tables, softmax_rtl
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import cache_folder
from ahcq_plugin.hls.rtl.simulate import Simulation, Stalls, build
from ahcq_plugin.zoo.sam import box_forward
from tests.export.probabilities import FAMILIES, make_quantizer

STALLS = (Stalls(), Stalls(idle=0.5), Stalls(back=0.5, seed=2), Stalls(0.3, 0.3, 90, 3))


def make_case(seed: int) -> tuple[TableSoftmax, np.ndarray]:
    """Constants of one to three heads, and scores (batch, m, n) of any spread, some masked."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 4))
    bits = int(rng.choice([2, 4, 6, 8]))
    scales = 2.0 ** rng.uniform(-14, 1, heads)
    step = TableSoftmax.of(scales, make_quantizer(FAMILIES[seed % 4], bits, rng))
    if bits < 7 and rng.random() < 0.5:  # bounds for each head
        others = [make_quantizer("lnq", bits, rng) for _ in range(heads)]
        step = TableSoftmax(
            step.mantissas,
            step.shifts,
            np.concatenate([TableSoftmax.of([1.0], other).bounds for other in others]),
            np.arange(2**bits),
        )
    n = int(rng.choice([1, 2, 7, 8, 9, 40, 100]))
    spread = int(rng.choice([0, 5, 300, 2**15, 2**24, 2**31 - 1]))
    scores = rng.integers(-spread, spread + 1, (heads * int(rng.integers(1, 3)), int(rng.integers(1, 5)), n))
    if rng.random() < 0.5:
        scores[rng.random(scores.shape) < 0.3] = MASKED
    return step, scores


def golden(step: TableSoftmax, scores: np.ndarray) -> np.ndarray:
    heads = np.arange(len(scores)) % len(step.mantissas)
    return step.run(scores, np.broadcast_to(heads[:, None], scores.shape[:2]))


def different(cases: list[tuple[TableSoftmax, np.ndarray]], found: list[np.ndarray]) -> int:
    return sum(int((golden(*case) != codes).sum()) for case, codes in zip(cases, found, strict=True))


def run_rtl(simulation: Simulation, launches: list[SoftmaxLaunch], stalls: Stalls) -> tuple[list[np.ndarray], int]:
    words = joined(launches)
    result = simulation.run(words, {"codes": len(words["scores"])}, stalls)
    return parted(launches, result.outputs["codes"]), result.cycles


def test_the_tables_are_those_of_the_golden_step() -> None:
    committed = sources("include", "ahcq", "engine", "softmax_tables.h").read_text(encoding="utf-8")
    assert committed == render_softmax_tables()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_codes_of_the_cpp_are_the_golden_steps(seeds: list[int]) -> None:
    cases = [make_case(seed) for seed in seeds]
    assert different(cases, softmax.run([SoftmaxLaunch.of(*case) for case in cases])) == 0


def test_the_longest_rows() -> None:
    rng = np.random.default_rng(0)
    step = TableSoftmax.of([0.01], make_quantizer("lnq", 4, rng))
    cases = [(step, scores) for scores in (rng.integers(-300, 300, (1, 3, 4096)), np.full((1, 2, 4096), 7))]
    assert different(cases, softmax.run([SoftmaxLaunch.of(*case) for case in cases])) == 0


@pytest.mark.parametrize(
    ("bits", "heads", "shape", "message"),
    [
        (4, 1, (1, 1, 4097), "scores of a row: got 4097, at most 4096"),
        (4, 65, (65, 1, 8), "heads: got 65, at most 64"),
        (8, 2, (2, 1, 8), "bounds of the codes: got 512, at most 256"),
        (4, 2, (3, 1, 8), "products of 2 heads"),
        (4, 1, (1, 0, 8), "none 0"),
    ],
)
def test_what_does_not_fit_is_refused(bits: int, heads: int, shape: tuple[int, int, int], message: str) -> None:
    step = TableSoftmax.of([0.1] * heads, make_quantizer("lnq", bits, np.random.default_rng(0)))
    if bits == 8:
        step = TableSoftmax(step.mantissas, step.shifts, np.repeat(step.bounds, heads, 0), step.rank_codes)
    with pytest.raises(SpecError, match=message):
        SoftmaxLaunch.of(step, np.zeros(shape, np.int64))


def test_every_process_makes_a_turn_a_cycle() -> None:
    """Or there would be no RTL; and no C++ of the kernels is in it."""
    rtl = softmax_rtl(cache_folder())
    assert set(rtl.scheduled) == {
        f"{name}_process"
        for name in ("announce", "find_top", "take_differences", "power_lane", "sum_powers", "take_log", "rank_codes")
    }
    assert not any(re.search(r"\bimport\b|DPI", text) for text in rtl.files.values())


@pytest.mark.slow
def test_codes_of_the_rtl_are_the_golden_steps() -> None:
    simulation = build(softmax_rtl(cache_folder()), cache_folder())
    cases = [make_case(seed) for seed in range(60)]
    launches = [SoftmaxLaunch.of(*case) for case in cases]
    for stalls in STALLS:
        assert different(cases, run_rtl(simulation, launches, stalls)[0]) == 0, stalls


@pytest.mark.slow
def test_rows_follow_each_other_without_a_gap() -> None:
    """A beat a cycle: behind the parameters, the row that waits for its top and the one that waits for its log."""
    simulation = build(softmax_rtl(cache_folder()), cache_folder())
    rng = np.random.default_rng(1)
    step = TableSoftmax.of([0.01], make_quantizer("lnq", 4, rng))
    for n, rows in ((4096, 6), (1024, 12), (196, 60), (64, 100), (9, 200)):
        case = (step, rng.integers(-300, 300, (1, rows, n)))
        found, cycles = run_rtl(simulation, [SoftmaxLaunch.of(*case)], Stalls())
        beats = -(-n // 8)
        assert different([case], found) == 0
        assert cycles <= rows * beats + 2 * beats + 100, (n, cycles)


@pytest.fixture(scope="module")
def real_cases(quantized, spec, scenes, module_patch) -> list[tuple[TableSoftmax, np.ndarray]]:
    """Constants and scores of every softmax of the packaged SAM on a scene."""
    cases, plain = [], TableSoftmax.run

    def watched(self: TableSoftmax, scores: np.ndarray, heads: np.ndarray | None) -> np.ndarray:
        cases.append((self, scores.reshape(-1, *scores.shape[-2:])))
        return plain(self, scores, heads)

    module_patch.setattr(TableSoftmax, "run", watched)
    table_softmax_forward(quantized, spec, scenes[0], box_forward)
    module_patch.undo()
    return cases


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.slow
def test_real_scores(real_cases) -> None:
    """All rows of all softmaxes of an image, in C++ and as RTL."""
    assert len(real_cases) == 13 and max(scores.shape[2] for _, scores in real_cases) == 1024
    launches = [SoftmaxLaunch.of(*case) for case in real_cases]
    assert different(real_cases, softmax.run(launches)) == 0
    simulation = build(softmax_rtl(cache_folder()), cache_folder())
    assert different(real_cases, run_rtl(simulation, launches, STALLS[-1])[0]) == 0


MUTANTS = [
    ("largest[1] > top) top", "largest[1] < top) top"),
    ("now.beat == 0 || largest", "largest"),
    ("if (now.beat * LANES + lane >= c.n) row", "if (false) row"),
    ("apart > 0xffffffu ? 0xffffffu : apart", "apart"),
    ("(halves + 1) >> 1", "halves >> 1"),
    ("== MASKED ? 1u << 24 : 0", "== 0 ? 1u << 24 : 0"),
    ("|| scaled > EXPONENT_LIMIT", ""),
    ("(exponent.to_uint() + 32) >> 6", "exponent.to_uint() >> 6"),
    ("octave > ONE_BITS ? ap_uint<ONE_BITS + 1>(0) : one", "one"),
    ("(now.beat == 0 ? power_sum(0) : sum) + powers", "sum + powers"),
    ("bit < SOFTMAX_SUM_BITS", "bit < 36"),
    ("LOGS[low + 1] - from", "LOGS[low] - from"),
    ("+ 2048) >> 12", ") >> 12"),
    ("key < bounds", "key <= bounds"),
    ("c.quantizers == 1 ? 0 : now.head", "0"),
    ("now.head + 1 == c.heads ? 0 : now.head + 1", "0"),
    ("high |= (code >> 4)", "high |= (code >> 5)"),
    ("if (now.beat * LANES + lane < c.n) {", "if (true) {"),
]


def fine_cases() -> list[tuple[TableSoftmax, np.ndarray]]:
    """Long rows and many bounds: enough scores near to one for a last bit to tell."""
    fine = TableSoftmax.of([0.001], make_quantizer("lnq", 8, np.random.default_rng(1)))
    many = np.random.default_rng(2).integers(-4000, 4001, (1, 100, 4000))
    return [(fine, np.arange(-2000, 2000)[None, None]), (fine, many)]


def test_last_bits_are_the_golden_steps() -> None:
    cases = fine_cases()
    assert different(cases, softmax.run([SoftmaxLaunch.of(*case) for case in cases])) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("text", "faulty"), MUTANTS, ids=[m[1] for m in MUTANTS])
def test_a_fault_is_seen(plant, text: str, faulty: str) -> None:
    plant("softmax.h", text, faulty)
    cases = [*(make_case(seed) for seed in range(120)), *fine_cases()]
    try:
        seen = different(cases, softmax.run([SoftmaxLaunch.of(*case) for case in cases])) > 0
    except RuntimeError:
        seen = True
    assert seen
