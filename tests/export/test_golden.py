# SPDX-License-Identifier: Apache-2.0
"""The golden model against exact rational arithmetic and plain loops."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import SpecError, golden
from ahcq_plugin.export.codes import decode, encode
from ahcq_plugin.export.golden import lane_operands
from ahcq_plugin.export.matmul import accumulator_range, lane_slices, lane_starts
from ahcq_plugin.export.operands import PerHeadOperand, UniformOperand
from tests.export.specs import HEADS, LEFT_FAMILIES, PRODUCTS, exact_value, make_left, make_linear, make_product

CASES = st.tuples(st.integers(2, 8), st.integers(1, 13), st.integers(1, 4), st.integers(0, 2**32 - 1))
EPS = 2.0**-24


def rational_output(matmul, left, right) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """(exact outputs, sums of the magnitudes of all terms) of one product (m, n)."""
    exact, sizes = [], []
    for row in left:
        values = [exact_value(matmul.left, int(code), channel) for channel, code in enumerate(row)]
        exact.append([])
        sizes.append([])
        for column in range(matmul.n):
            if matmul.kind == "linear":
                scale = Fraction(float(matmul.right.scales[column]))
                zero = int(matmul.right.zero_points[column])
                factors = [(int(code) - zero) * scale for code in matmul.right.codes[column]]
                bias = Fraction(float(matmul.bias[column]))
            else:
                codes = right[column] if matmul.kind == "qk" else right[:, column]
                factors, bias = [exact_value(matmul.right, int(code)) for code in codes], Fraction(0)
            terms = [x * y for x, y in zip(values, factors, strict=True)]
            exact[-1].append(sum(terms) + bias)
            offset = 2 * abs(Fraction(float(getattr(matmul.left, "offset", 0))))
            parts = sum((abs(x) + offset) * abs(y) for x, y in zip(values, factors, strict=True)) + abs(bias)
            sizes[-1].append(parts)
    return exact, sizes


@settings(max_examples=60)
@given(CASES, st.sampled_from(LEFT_FAMILIES))
def test_linear_equals_exact_arithmetic(case, family):
    bits, k, n, seed = case
    rng = np.random.default_rng(seed)
    matmul = make_linear(family, bits, k, n, rng, w_bits=int(rng.integers(2, 9)))
    left = rng.integers(0, 2**bits, (3, k))
    result = golden.run(matmul, left)
    exact, sizes = rational_output(matmul, left, None)
    for i in range(3):
        for j in range(n):
            # at most 12 roundings (5 groups) of values that are no larger than the sum of the magnitudes
            assert abs(Fraction(float(result.output[i, j])) - exact[i][j]) <= 12 * EPS * sizes[i][j]


def of_head(operand, head: int):
    """The operand that one head has by itself."""
    if not isinstance(operand, PerHeadOperand):
        return operand
    return UniformOperand(operand.bits, operand.scales[head], int(operand.zero_points[head]))


@settings(max_examples=60)
@given(CASES, st.sampled_from(PRODUCTS[2:]))
def test_every_head_computes_with_its_own_scale_and_zero_point(case, kind):
    """Heads are the innermost of the leading axes; each gives what the matmul of its parameters alone gives."""
    bits, k, n, seed = case
    rng = np.random.default_rng(seed)
    matmul = make_product(*kind[:2], bits, k, n, rng, right_family=kind[2])
    left = rng.integers(0, 2**bits, (2, HEADS, 3, k))
    right = rng.integers(0, 2**bits, (2, HEADS, *((n, k) if kind[0] == "qk" else (k, n))))
    result = golden.run(matmul, left, right)
    flat = golden.run(matmul, left.reshape(-1, 3, k), right.reshape(-1, *right.shape[2:]))
    assert np.array_equal(flat.output, result.output.reshape(flat.output.shape))
    limit = 2 ** (matmul.accumulator_bits - 1)
    for image, head in np.ndindex(2, HEADS):
        alone = dataclasses.replace(matmul, batch=1, left=of_head(matmul.left, head), right=of_head(matmul.right, head))
        wanted = golden.run(alone, left[image, head], right[image, head])
        assert np.array_equal(result.accumulators[image, head], wanted.accumulators)
        assert np.array_equal(result.output[image, head].view(np.uint32), wanted.output.view(np.uint32))
        assert -limit <= wanted.accumulators.min() and wanted.accumulators.max() < limit
    widest = [accumulator_range(of_head(matmul.left, h), of_head(matmul.right, h), k) for h in range(HEADS)]
    assert accumulator_range(matmul.left, matmul.right, k) == (min(lo for lo, _ in widest), max(hi for _, hi in widest))


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_codes_per_head_are_those_of_the_heads(bits, seed):
    rng = np.random.default_rng(seed)
    operand = make_left("per_head", bits, 1, rng)
    x = (rng.normal(size=(2, HEADS, 4, 5)) * 2 ** rng.uniform(-9, 5)).astype(np.float32)
    codes = encode(operand, x)
    values = decode(operand, codes)
    for head in range(HEADS):
        one = of_head(operand, head)
        assert np.array_equal(codes[:, head], encode(one, x[:, head]))
        assert np.array_equal(values[:, head], decode(one, codes[:, head]))
    assert np.array_equal(encode(operand, values), codes)


def test_products_that_are_no_multiple_of_the_heads_are_refused():
    matmul = make_product("qk", "per_head", 4, 5, 2, np.random.default_rng(0), right_family="per_head")
    codes = np.zeros((2, 2, 2, 5), np.int64)
    with pytest.raises(SpecError, match=r"'matmul_1': the leading axes .* hold 4 products, .* multiple of the 3 heads"):
        golden.run(matmul, codes, codes)
    with pytest.raises(SpecError, match=r"4 products .* cannot be shared out to 3 heads"):
        encode(matmul.left, codes.astype(np.float32))
    with pytest.raises(SpecError, match="`batch` must be a multiple of the 3 heads, got 4"):
        dataclasses.replace(matmul, batch=4)
    right = PerHeadOperand(4, matmul.right.scales[:2], matmul.right.zero_points[:2])
    with pytest.raises(SpecError, match="the right operand has 2 heads, the other 3"):
        dataclasses.replace(matmul, right=right)
    with pytest.raises(SpecError, match="the left operand of kind linear must be one of uniform, grouped, hluq, table"):
        dataclasses.replace(make_linear("uniform", 4, 5, 2, np.random.default_rng(0)), left=matmul.left)


@settings(max_examples=60)
@given(CASES, st.sampled_from([("qk", "uniform"), ("av", "uniform"), ("av", "table")]))
def test_products_equal_exact_arithmetic(case, kind):
    bits, k, n, seed = case
    rng = np.random.default_rng(seed)
    matmul = make_product(*kind, bits, k, n, rng)
    left = rng.integers(0, 2**bits, (3, k))
    right = rng.integers(0, 2**bits, (n, k) if kind[0] == "qk" else (k, n))
    result = golden.run(matmul, left, right)
    exact, _ = rational_output(matmul, left, right)
    scale = Fraction(float(getattr(matmul.left, "unit", None) or matmul.left.scale)) * Fraction(
        float(matmul.right.scale)
    )
    for i in range(3):
        for j in range(n):
            assert int(result.accumulators[i, j, 0]) * scale == exact[i][j]
            assert abs(Fraction(float(result.output[i, j])) - exact[i][j]) <= 4 * EPS * abs(exact[i][j])


@settings(max_examples=60)
@given(CASES, st.sampled_from(LEFT_FAMILIES))
def test_accumulators_reach_their_bound_and_no_register_leaves_it(case, family):
    bits, k, n, seed = case
    rng = np.random.default_rng(seed)
    matmul = make_linear(family, bits, k, n, rng)
    lo, hi = accumulator_range(matmul.left, matmul.right, k)
    starts, seen = lane_starts(matmul.left, matmul.right), [0]
    for positive in (True, False):
        for column in range(n):
            weights = lane_slices(matmul.left, matmul.right.signed())
            for lane, weight in enumerate(weights):
                # codes that make the lane's operand largest where that helps and smallest elsewhere
                per_code = lane_operands(matmul.left, np.tile(np.arange(2**bits)[:, None], (1, k)))[lane]
                best, worst = per_code.argmax(0)[0], per_code.argmin(0)[0]
                chosen = np.where((weight[column] > 0) == positive, best, worst)
                codes = np.zeros(k, np.int64)
                group = np.arange(k)
                if family == "grouped":
                    group = np.split(matmul.left.permutation, matmul.left.boundaries[1:-1])[lane]
                codes[group] = chosen
                acc = golden.run(matmul, codes[None]).accumulators[0, column, lane]
                running = starts[column, lane]
                for u, w in zip(lane_operands(matmul.left, codes)[lane], weight[column], strict=True):
                    running += u * w
                    seen.append(int(running))
                assert running == acc
    assert (min(seen), max(seen)) == (lo, hi)


@settings(max_examples=40)
@given(CASES, st.sampled_from([("qk", "uniform"), ("av", "table")]))
def test_two_sided_registers_reach_their_bound(case, kind):
    bits, k, n, seed = case
    matmul = make_product(*kind, bits, k, n, np.random.default_rng(seed))
    tops = int(getattr(matmul.left, "table", np.array([2**bits - 1])).max()), 2**bits - 1
    zeros = getattr(matmul.left, "zero_point", 0), matmul.right.zero_point
    seen = []
    for a in (0, tops[0]):
        for b in (0, tops[1]):
            product, by_right, by_left = k * a * b, zeros[1] * k * a, zeros[0] * k * b
            first = product - by_right
            seen += [product, by_right, by_left, first, first - by_left, first - by_left + k * zeros[0] * zeros[1]]
    assert accumulator_range(matmul.left, matmul.right, k) == (min(seen), max(seen))


@pytest.mark.parametrize("family", LEFT_FAMILIES)
def test_wide_accumulators_take_the_integer_path(family, monkeypatch):
    rng = np.random.default_rng(1)
    matmul = make_linear(family, 8, 300, 5, rng)
    codes = rng.integers(0, 256, (7, 300))
    fast = golden.run(matmul, codes)
    monkeypatch.setattr(golden, "_EXACT_FLOAT64", 0)
    slow = golden.run(matmul, codes)
    assert np.array_equal(fast.accumulators, slow.accumulators) and np.array_equal(fast.output, slow.output)


@pytest.mark.parametrize("family", LEFT_FAMILIES)
def test_order_of_float_operations(family):
    """Values followed by hand, step by step in float32."""
    rng = np.random.default_rng(3)
    f = np.float32
    matmul = make_linear(family, 4, 64, 40, rng)
    left, weights = matmul.left, matmul.right
    result = golden.run(matmul, rng.integers(0, 16, (5, 64)))
    for row, n in np.ndindex(5, 40):
        acc = [f(int(value)) for value in result.accumulators[row, n]]
        if family == "uniform":
            t = acc[0] * left.scale
        elif family == "grouped":
            t = acc[0] * left.scales[0]
            for g in range(1, left.groups):
                t = f(t + f(acc[g] * left.scales[g]))
        else:
            offset = f(left.offset * f(int(weights.signed()[n].sum())))
            if family == "hluq":
                t = f(acc[0] * left.scale_uniform) + f(acc[1] * f(left.scale_log * f(2.0 ** (1 - left.log_levels))))
            else:
                t = acc[0] * left.unit
            t = f(t + offset)
        assert result.output[row, n] == f(f(t * weights.scales[n]) + matmul.bias[n])


@pytest.mark.parametrize("family", LEFT_FAMILIES)
def test_decode_is_the_exact_value_rounded(family):
    operand = make_left(family, 5, 6, np.random.default_rng(5))
    codes = np.tile(np.arange(32)[:, None], (1, 6))
    values = decode(operand, codes)
    for code in range(32):
        for channel in range(6):
            exact = exact_value(operand, code, channel)
            size = abs(exact) + 2 * abs(Fraction(float(getattr(operand, "offset", 0))))
            assert abs(Fraction(float(values[code, channel])) - exact) <= 4 * EPS * size


def test_encode_ties_and_saturation():
    operand = make_left("uniform", 4, 1, np.random.default_rng(0))
    scale, zero = operand.scale, operand.zero_point
    halves = (np.arange(-20, 21) + np.float32(0.5)).astype(np.float32)
    exact = type(operand)(4, np.float32(0.5), zero)
    wanted = [min(max(round(float(h)) + zero, 0), 15) for h in halves]  # Python rounds half to even too
    assert encode(exact, halves * np.float32(0.5)).tolist() == wanted
    assert encode(operand, np.array([np.inf, -np.inf, 3e38], np.float32) * np.sign(scale)).tolist() == [15, 0, 15]
    table = make_left("table", 3, 1, np.random.default_rng(0))
    ranks = np.argsort(table.rank_codes)[encode(table, table.boundaries)]
    assert ranks.tolist() == list(range(1, 8))  # on a boundary: the upper level
    below = np.nextafter(table.boundaries, np.float32(-np.inf))
    assert np.argsort(table.rank_codes)[encode(table, below)].tolist() == list(range(7))


@pytest.mark.parametrize(
    "codes, message",
    [
        (np.zeros((2, 5), np.int64), r"left codes must be integers \(..., any, 6\), got int64 \(2, 5\)"),
        (np.zeros((2, 6), np.float32), "got float32"),
        (np.full((2, 6), 16), r"left codes must lie in \[0, 15\], got \[16, 16\]"),
        (np.full((2, 6), -1), r"got \[-1, -1\]"),
        (np.zeros(6, np.int64), r"got int64 \(6,\)"),
    ],
)
def test_bad_codes(codes, message):
    matmul = make_linear("uniform", 4, 6, 2, np.random.default_rng(0))
    with pytest.raises(SpecError, match=message):
        golden.run(matmul, codes)


def test_bad_right_codes():
    rng = np.random.default_rng(0)
    codes = np.zeros((2, 6), np.int64)
    with pytest.raises(SpecError, match="`right_codes` must be None"):
        golden.run(make_linear("uniform", 4, 6, 2, rng), codes, codes)
    with pytest.raises(SpecError, match=r"right codes must be integers \(..., 6, any\)"):
        golden.run(make_product("av", "table", 4, 6, 2, rng), codes, codes)
    with pytest.raises(SpecError, match="leading axes of the codes differ"):
        golden.run(make_product("qk", "uniform", 4, 6, 2, rng), codes[None], codes)
