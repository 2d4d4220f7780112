# SPDX-License-Identifier: Apache-2.0
"""Softmax on tables: against an oracle in Python's integers, the exact probabilities, and its own symmetries."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.operands import PerHeadOperand, SpecError, UniformOperand
from ahcq_plugin.export.table_softmax import (
    ALWAYS,
    ERROR_BOUND,
    LIMIT,
    MASKED,
    TableSoftmax,
    bounds,
    factor,
    log_sums,
    logs,
    powers,
    score_bits,
)
from tests.export.probabilities import FAMILIES, code_ranks, make_quantizer

getcontext().prec = 50
OCTAVE = 2**16


@st.composite
def rows(draw, largest: int = 200):
    """(scores int64 (rows, n), scale, quantizer): ties, masks, wide and narrow rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 64, largest]))
    spread = draw(st.sampled_from([0, 1, 40, 2000, 2**15, 2**23, 2**31 - 1]))
    scores = rng.integers(-spread, spread + 1, (3, n))
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.3] = MASKED
    scale = 2.0 ** draw(st.floats(-20, 4)) if spread else 1.0
    quantizer = make_quantizer(draw(st.sampled_from(FAMILIES)), draw(st.sampled_from([2, 4, 6, 8])), rng)
    return scores, scale, quantizer


def oracle(scores: list[int], scale: float, operand) -> list[int]:
    """The definition in Python's own numbers, a score at a time; tables and thresholds by Decimal."""
    two = Decimal(2)
    octaves = Decimal(scale) / two.ln() * OCTAVE
    shift = 1
    while shift < 50 and octaves * two ** (shift + 1) < 2**24 - Decimal("0.5"):
        shift += 1
    mantissa = min(int((octaves * two**shift).to_integral_value()), 2**24 - 1)
    top = max(scores)
    exponents = []
    for score in scores:
        distance = min(top - score, 2**24 - 1)
        exponents.append(LIMIT if score == MASKED else min((distance * mantissa + 2 ** (shift - 1)) // 2**shift, LIMIT))
    total = 0
    for exponent in exponents:
        octave, part = divmod((exponent + 32) // 64, 1024)
        entry = int((two ** (17 - Decimal(part) / 1024)).to_integral_value())
        total += entry * 2**13 // 2**octave
    log = 0
    if total:
        first = total.bit_length() - 1
        low, rest = divmod((total - 2**first) * 2**20 // 2**first, 4096)
        ends = [int(((1 + Decimal(at) / 256).ln() / two.ln() * OCTAVE).to_integral_value()) for at in (low, low + 1)]
        log = (first - 30) * OCTAVE + ends[0] + ((ends[1] - ends[0]) * rest + 2048) // 4096
    zero = encode(operand, np.zeros(1, np.float32))[0]
    codes = []
    for exponent in exponents:
        if exponent == LIMIT:
            codes.append(int(zero))
            continue
        # The least float32 that is no smaller than the probability has its code: thresholds are float32.
        probability = two ** (-Decimal(exponent + log) / OCTAVE)
        below = np.float32(probability)
        while Decimal(float(below)) > probability:
            below = np.nextafter(below, np.float32(-1))
        codes.append(int(encode(operand, np.array([below]))[0]))
    return codes


@settings(deadline=None, max_examples=60)
@given(rows(24))
def test_codes_are_the_oracles(case) -> None:
    scores, scale, quantizer = case
    found = TableSoftmax.of([scale], quantizer).run(scores)
    assert found.tolist() == [oracle(row, scale, quantizer) for row in scores.tolist()]


def test_tables_are_exactly_rounded() -> None:
    two, half = Decimal(2), Decimal("0.5")
    for table, exact in (
        (powers(), [two ** (17 - Decimal(i) / 1024) for i in range(1024)]),
        (logs(), [(1 + Decimal(i) / 256).ln() / two.ln() * OCTAVE for i in range(257)]),
    ):
        assert all(abs(int(found) - wanted) < half for found, wanted in zip(table, exact, strict=True))
    assert powers().max() == 2**17 and powers().min() > 2**16 and logs().max() == 2**16


@given(st.floats(1e-30, 1e30))
def test_a_factor_is_the_scale_to_24_bits(scale: float) -> None:
    mantissa, shift = factor(scale)
    assert 0 <= mantissa < 2**24 and 1 <= shift <= 50
    octaves = scale * math.log2(math.e)
    if 2.0**-42 < octaves < 127.99999:
        assert mantissa >= 2**23 and mantissa * 2.0 ** (-16 - shift) == pytest.approx(octaves, rel=2.0**-24)
    elif octaves >= 128:
        assert (mantissa + 1) >> 1 > LIMIT  # one unit below the top counts as nothing


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    with pytest.raises(SpecError, match="positive finite"):
        factor(scale)


@settings(deadline=None, max_examples=5)
@given(st.sampled_from(FAMILIES), st.sampled_from([2, 4, 8]), st.integers(0, 2**32))
def test_a_bound_is_the_last_key_below_its_threshold(family: str, bits: int, seed: int) -> None:
    """By whole numbers alone: 2^-y >= t of a float t = m 2^q is m^65536 <= 2^(-y - 65536 q), y in 2^-16 octaves."""
    operand = make_quantizer(family, bits, np.random.default_rng(seed))
    found = bounds(operand)
    assert (np.diff(found) <= 0).all()
    for rank in (0, len(found) // 2, len(found) - 1):
        bound = int(found[rank])
        if bound in (0, LIMIT, ALWAYS):
            continue
        # the threshold, found again between 0 and 1 by bisection over floats
        low, high = 0, int(np.float32(1).view(np.int32)) + 1
        while high - low > 1:
            middle = (low + high) // 2
            code = encode(operand, np.array([middle], np.int32).view(np.float32))[0]
            low, high = (low, middle) if code_ranks(operand)[code] > rank else (middle, high)
        least = np.array([high], np.int32).view(np.float32)[0]
        numerator, denominator = float(least).as_integer_ratio()
        power = numerator**OCTAVE
        shifted = OCTAVE * (denominator.bit_length() - 1)
        assert power <= 1 << (shifted - (bound - 1)) and power > 1 << (shifted - bound), rank


@settings(deadline=None, max_examples=60)
@given(rows())
def test_codes_are_those_of_the_exact_softmax_but_near_thresholds(case) -> None:
    """A probability whose code is another one lies within ERROR_BOUND of a threshold."""
    scores, scale, quantizer = case
    scores = np.where(scores == MASKED, MASKED, np.maximum(scores, scores.max(1, keepdims=True) - 2**24 + 1))
    found = TableSoftmax.of([scale], quantizer).run(scores)
    plain = np.where(scores == MASKED, -np.inf, (scores - scores.max(1, keepdims=True)) * np.float64(scale))
    alive = (scores != MASKED).any(1)
    logarithm = plain - np.log(np.maximum(np.exp(plain).sum(1, keepdims=True), 1))
    nearest = [np.exp(logarithm + sign * (ERROR_BOUND + 1) / OCTAVE * math.log(2)) for sign in (-1, 1)]
    ends = [code_ranks(quantizer)[encode(quantizer, np.float32(p))] for p in nearest]
    ranks = code_ranks(quantizer)[found]
    inside = (ends[0] <= ranks) & (ranks <= ends[1])
    assert inside[alive].all()


def test_how_far_keys_are_from_the_exact_logarithm() -> None:
    rng = np.random.default_rng(0)
    worst = 0.0
    for n in (1, 2, 50, 1024, 4096):
        for spread in (1, 30, 300, 3000):
            step = TableSoftmax.of([0.02], make_quantizer("lnq", 4, rng))
            scores = rng.integers(-spread, spread + 1, (4, n))
            exponents = step.exponents(scores, np.zeros(4, np.int64))
            keys = exponents + log_sums(exponents)[:, None]
            x = (scores - scores.max(1, keepdims=True)) * (0.02 / math.log(2))
            exact = np.log2(np.exp2(x).sum(1, keepdims=True)) - x
            worst = max(worst, np.abs(keys / OCTAVE - exact)[exact < 127].max() * OCTAVE)
    # all at one distance below the top: every term of the sum is rounded the same way
    for distance in range(1, 64):
        scores = np.zeros((1, 4096), np.int64) - distance
        scores[0, 0] = 0
        exponents = step.exponents(scores, np.zeros(1, np.int64))
        exact = math.log2(1 + 4095 * 2 ** (-distance * 0.02 / math.log(2)))
        worst = max(worst, abs(log_sums(exponents)[0] / OCTAVE - exact) * OCTAVE)
    assert 10 < worst < ERROR_BOUND


@settings(deadline=None, max_examples=40)
@given(rows(), st.integers(-(2**20), 2**20))
def test_a_constant_added_to_a_row_changes_nothing(case, constant: int) -> None:
    scores, scale, quantizer = case
    scores = np.where(scores == MASKED, MASKED, np.clip(scores, -(2**30), 2**30))
    moved = np.where(scores == MASKED, MASKED, scores + constant)
    step = TableSoftmax.of([scale], quantizer)
    assert np.array_equal(step.run(scores), step.run(moved))


@settings(deadline=None, max_examples=40)
@given(rows())
def test_a_larger_score_has_no_lower_rank_and_equal_scores_have_equal_codes(case) -> None:
    scores, scale, quantizer = case
    codes = TableSoftmax.of([scale], quantizer).run(scores)
    ranks = code_ranks(quantizer)[codes]
    order = np.argsort(scores, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(ranks, order, 1), axis=1) >= 0).all()
    for row, found in zip(scores.tolist(), codes.tolist(), strict=True):
        assert len(set(zip(row, found, strict=True))) == len(set(row))


@pytest.mark.parametrize("n", [1, 2, 64, 4096, 2**16])
def test_equal_scores_share_equally(n: int) -> None:
    quantizer = make_quantizer("lnq", 4, np.random.default_rng(3))
    codes = TableSoftmax.of([0.01], quantizer).run(np.full((1, n), -17))
    assert (codes == encode(quantizer, np.array([1 / n], np.float32))[0]).all()


def test_masked_scores_take_no_part() -> None:
    quantizer = make_quantizer("lnq", 4, np.random.default_rng(4))
    step, zero = TableSoftmax.of([0.02], quantizer), encode(quantizer, np.zeros(1, np.float32))[0]
    scores = np.random.default_rng(5).integers(-200, 200, (2, 30))
    wide = np.concatenate([scores, np.full((2, 5), MASKED)], 1)
    assert np.array_equal(step.run(wide)[:, :30], step.run(scores)) and (step.run(wide)[:, 30:] == zero).all()
    assert (step.run(np.full((1, 9), MASKED)) == zero).all()


def test_every_head_has_its_own_constants() -> None:
    rng = np.random.default_rng(6)
    scores = rng.integers(-300, 300, (4, 5, 3, 20))
    heads = rng.integers(0, 3, scores.shape[:-1])
    scales = [0.01, 0.03, 0.002]
    quantizer = PerHeadOperand(4, np.array([0.05, 0.02, 0.06], np.float32), np.array([0, 1, 2]))
    found = TableSoftmax.of(scales, quantizer).run(scores, heads)
    for head, scale in enumerate(scales):
        alone = UniformOperand(4, quantizer.scales[head], int(quantizer.zero_points[head]))
        wanted = TableSoftmax.of([scale], alone).run(scores)
        assert np.array_equal(found[heads == head], wanted[heads == head])
    with pytest.raises(SpecError, match="3 heads, the scores have 2"):
        TableSoftmax.of(scales[:2], quantizer)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 3), np.float32), "integers"),
        (np.zeros((2, 0), np.int64), "1 to 65536"),
        (np.zeros((1, 2**16 + 1), np.int8), "1 to 65536"),
        (np.array([[0, 2**31]]), "32 bits"),
        (np.array([[0, -(2**31) - 1]]), "32 bits"),
    ],
)
def test_what_does_not_fit_is_refused(scores: np.ndarray, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TableSoftmax.of([0.1], make_quantizer("lnq", 4, np.random.default_rng(0))).run(scores)


@given(st.floats(1e-9, 100))
def test_units_of_positions_are_as_fine_as_they_should_be(scale: float) -> None:
    bits = score_bits(np.array([scale / 3, scale]))
    unit = scale * math.log2(math.e) * 2.0**-bits
    assert 0 <= bits <= 12 and (bits == 12 or unit <= 2**-12) and (bits == 0 or unit > 2.0**-13)
