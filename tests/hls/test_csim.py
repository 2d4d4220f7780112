# SPDX-License-Identifier: Apache-2.0
"""Generated C++ against the integer golden model: every accumulator and every bit of every float."""

from __future__ import annotations

import numpy as np
import pytest

from ahcq_plugin.export import GroupedOperand, HLUQOperand, PerHeadOperand, SpecError, golden
from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.operands import top
from ahcq_plugin.hls.vectors import make_vectors, quantizer_values

FAMILIES = ("uniform", "grouped", "hluq", "table", "qk", "av", "av_table")
OTHERS = ("uniform_8", "grouped_6", "hluq_8", "table_3", "av_table_8", "qk_heads", "av_table_heads")


def run_many(cases, compiled, name: str, rows: int, seed: int) -> int:
    """Compare ``rows`` rows, in launches of 20 000 (products: 100 right operands each); returns how many ran."""
    layer, function = compiled[name]
    done = 0
    while done < rows:
        batch = 1 if layer.matmul.kind == "linear" else 100
        vectors = make_vectors(layer.matmul, batch, min(20000, rows) // batch, seed + done)
        result = function.run(vectors.left, vectors.right)
        assert cases.differences(layer, vectors, result.accumulators, result.output) == (0, 0)
        done += vectors.left.shape[0] * vectors.left.shape[1]
    return done


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hundred_thousand_rows_are_equal(cases, compiled, name: str) -> None:
    assert run_many(cases, compiled, name, 100_000, seed=1) >= 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_million_rows_are_equal(cases, compiled, name: str) -> None:
    assert run_many(cases, compiled, name, 1_000_000, seed=2) >= 1_000_000


@pytest.mark.parametrize("name", OTHERS)
def test_other_widths_are_equal(cases, compiled, name: str) -> None:
    run_many(cases, compiled, name, 10_000, seed=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_directed_rows_reach_the_corners(cases, name: str) -> None:
    """Half of the rows are what they are called: saturation on both ends, zero rows, single codes, both group edges."""
    matmul = cases.make_layer(name).matmul
    vectors = make_vectors(matmul, 1, 4000, seed=4)
    left = vectors.left.reshape(-1, matmul.k)
    assert {0, top(matmul.left.bits)} <= {int(row[0]) for row in left if (row == row[0]).all()}
    result = golden.run(matmul, vectors.left, vectors.right)
    if matmul.kind == "linear":
        # the accumulators reach what the spec proves that they can reach
        extreme = max(-int(result.accumulators.min()), int(result.accumulators.max()) + 1)
        assert extreme > 2 ** (matmul.accumulator_bits - 2)
    if isinstance(matmul.left, GroupedOperand):
        zero = matmul.left.zero_points[matmul.left.labels()]
        single = {int(np.flatnonzero(row != zero)[0]) for row in left if (row != zero).sum() == 1}
        edges = {*matmul.left.boundaries[:-1].tolist(), *(matmul.left.boundaries[1:] - 1).tolist()}
        assert {int(matmul.left.permutation[edge]) for edge in edges} <= single
    if isinstance(matmul.left, HLUQOperand):
        split = matmul.left.log_levels
        assert {split - 1, split, split + 1} <= {int(row[0]) for row in left if (row == row[0]).all()}


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_quantizers_give_the_same_codes(compiled, name: str) -> None:
    layer, function = compiled[name]
    matmul = layer.matmul
    sides = {"left_quantizer": (matmul.left, matmul.k)}
    if matmul.kind != "linear":
        sides["right_quantizer"] = (matmul.right, matmul.k if matmul.kind == "qk" else matmul.n)
    for side, (operand, length) in sides.items():
        values = quantizer_values(operand, 6000, length, seed=5)
        if isinstance(operand, PerHeadOperand):
            values = values.reshape(-1, 2, length)
        codes = function.quantize(side, values)
        np.testing.assert_array_equal(codes, encode(operand, values))
        assert set(np.unique(codes)) == set(range(2**operand.bits)), "every code must occur"


def test_launches_do_not_remember_each_other(cases, compiled) -> None:
    layer, function = compiled["hluq"]
    vectors = make_vectors(layer.matmul, 1, 8, seed=6)
    first = function.run(vectors.left)
    function.run(vectors.left[:, ::-1][:, :3])
    again = function.run(vectors.left)
    np.testing.assert_array_equal(first.output.view(np.uint32), again.output.view(np.uint32))


@pytest.mark.parametrize("code", [16, 256, 259, -1, 2**32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_codes_that_do_not_fit_are_refused(compiled, side: str, code: int) -> None:
    """Also those that would fit after wrapping around to a byte."""
    layer, function = compiled["qk"]
    vectors = make_vectors(layer.matmul, 1, 2, seed=7)
    codes = {"left": vectors.left.copy(), "right": vectors.right.copy()}
    codes[side][0, 1, 2] = code
    with pytest.raises(SpecError, match=rf"'qk': the {side} codes must lie in \[0, 15\]"):
        function.run(codes["left"], codes["right"])


@pytest.mark.parametrize(
    ("name", "left", "right", "message"),
    [
        ("qk", (1, 2, 20), (1, 10, 21), r"the left codes must be integers \(..., any, 21\)"),
        ("qk", (1, 2, 21), (1, 9, 21), r"right codes of shape \(1, 9, 21\), expected \(1, 10, 21\)"),
        ("qk", (2, 21), (10, 21), r"left codes of shape \(2, 21\), expected \(batch, rows, 21\)"),
        ("uniform", (1, 2, 21), (1, 10, 21), "`right_codes` must be None"),
    ],
)
def test_codes_of_another_shape_are_refused(compiled, name: str, left, right, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        compiled[name][1].run(np.zeros(left, np.int64), np.zeros(right, np.int64))


def test_values_of_another_length_are_refused(compiled) -> None:
    with pytest.raises(
        SpecError, match=r"'uniform': values for the left_quantizer of shape \(3, 20\), expected \(rows, 21\)"
    ):
        compiled["uniform"][1].quantize("left_quantizer", np.zeros((3, 20), np.float32))
