# SPDX-License-Identifier: Apache-2.0
"""Operands and matmuls refuse what cannot be right, and say what, got, allowed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.export import GroupedOperand, Patches, SpecError, UniformOperand, Unsupported
from ahcq_plugin.export.matmul import accumulator_range, signed_bits
from tests.export import specs

RNG = np.random.default_rng(0)
LEFT = {family: specs.make_left(family, 4, 6, RNG) for family in specs.LEFT_FAMILIES}
WEIGHT = specs.make_weight(4, 3, 6, RNG)
INT, FLOAT = np.int64, np.float32


@pytest.mark.parametrize(
    "operand, change, message",
    [
        (LEFT["uniform"], {"bits": 1}, r"`bits` must be an integer in \[2, 8\], got 1"),
        (LEFT["uniform"], {"bits": True}, "got True"),
        (LEFT["uniform"], {"scale": FLOAT(0)}, "`scale` must be a positive finite float32"),
        (LEFT["uniform"], {"scale": 0.5}, "`scale` must be a positive finite float32, got 0.5"),
        (LEFT["uniform"], {"scale": FLOAT(np.nan)}, "got .*nan"),
        (LEFT["uniform"], {"zero_point": 16}, r"`zero_point` must be an integer in \[0, 15\], got 16"),
        (LEFT["grouped"], {"permutation": np.array([0, 1, 2, 3, 4, 4])}, r"must hold each of 0..5 once, got \[0, 1"),
        (LEFT["grouped"], {"permutation": np.arange(5)}, "`boundaries` must ascend strictly from 0 to 5"),
        (LEFT["grouped"], {"permutation": np.arange(6, dtype=np.int32)}, "must be int64 .* got int32"),
        (LEFT["grouped"], {"scales": -np.ones(LEFT["grouped"].groups, FLOAT)}, "must be positive and finite"),
        (LEFT["grouped"], {"scales": np.ones(9, FLOAT)}, r"`scales` must be float32 .* got float32 \(9,\)"),
        (LEFT["hluq"], {"log_levels": 15}, r"`log_levels` must be an integer in \[1, 14\], got 15"),
        (LEFT["hluq"], {"boundaries": LEFT["hluq"].boundaries[::-1].copy()}, "`boundaries` must ascend, got .* sort"),
        (LEFT["hluq"], {"boundaries": LEFT["hluq"].boundaries[1:]}, r"must be float32 \(15,\), got float32 \(14,\)"),
        (LEFT["table"], {"boundaries": np.full(15, np.inf, FLOAT)}, "`boundaries` must be finite"),
        (LEFT["table"], {"rank_codes": np.zeros(16, INT)}, "`rank_codes` must hold each of 0..15 once"),
        (LEFT["table"], {"table": LEFT["table"].table[::-1].copy()}, "must not descend from rank to rank"),
        (LEFT["table"], {"table": np.full(16, 2**31)}, "`table` must lie in"),
        (LEFT["table"], {"unit": FLOAT(-1)}, "`unit` must be a positive"),
        (WEIGHT, {"codes": np.full((3, 6), 16)}, r"`codes` must lie in \[0, 15\], got \[16, 16\]"),
        (WEIGHT, {"codes": np.zeros(6, INT)}, r"must be int64 \(N, K\), got int64 \(6,\)"),
        (WEIGHT, {"zero_points": np.zeros(2, INT)}, r"`zero_points` must be int64 \(3,\), got int64 \(2,\)"),
    ],
)
def test_bad_operands(operand, change, message):
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(operand, **change)


@pytest.mark.parametrize("bounds", [[0, 3, 3, 6], [1, 6], [0, 5], [0, 4, 2, 6], [0]])
def test_bad_group_boundaries(bounds):
    groups = max(len(bounds) - 1, 1)
    with pytest.raises(SpecError, match="`boundaries` must ascend strictly from 0 to 6"):
        GroupedOperand(4, np.arange(6), np.array(bounds), np.ones(groups, FLOAT), np.zeros(groups, INT))


LINEAR = specs.make_linear("uniform", 4, 6, 3, RNG)
AV = specs.make_product("av", "table", 4, 6, 3, RNG)


@pytest.mark.parametrize(
    "matmul, change, message",
    [
        (LINEAR, {"kind": "conv"}, "`kind` must be one of linear, qk, av, got 'conv'"),
        (LINEAR, {"accumulator_bits": LINEAR.accumulator_bits - 1}, r"too narrow: values from -?\d+ to \d+ need"),
        (LINEAR, {"k": 5}, r"weight has shape \(3, 6\), `n`, `k` are \(3, 5\)"),
        (LINEAR, {"n": 4}, r"weight has shape \(3, 6\)"),
        (LINEAR, {"left": specs.make_left("grouped", 4, 7, RNG)}, "the left operand has 7 channels, `k` is 6"),
        (LINEAR, {"bias": None}, r"`bias` must be float32 \(3,\), got NoneType"),
        (LINEAR, {"bias": np.full(3, np.nan, FLOAT)}, "`bias` must be finite"),
        (LINEAR, {"right": LINEAR.left}, "right operand of kind linear must be one of weight, got uniform"),
        (LINEAR, {"patches": Patches(2, (2, 2), (1, 1), (0, 0))}, "`patches` make rows of 8, `k` is 6"),
        (AV, {"left": LEFT["hluq"]}, "left operand of kind av must be one of uniform, per_head, table, got hluq"),
        (AV, {"left": dataclasses.replace(AV.left, offset=FLOAT(0.5))}, "must have the offset 0, got 0.5; use"),
        (AV, {"bias": np.zeros(3, FLOAT)}, "kind av has no layer, no bias"),
        (AV, {"m": 0}, r"`m` must be an integer in \[1, "),
    ],
)
def test_bad_matmuls(matmul, change, message):
    with pytest.raises(SpecError, match=f"matmul 'matmul_1': .*{message}"):
        dataclasses.replace(matmul, **change)


def test_unsupported_operands_have_their_own_error():
    with pytest.raises(Unsupported):
        dataclasses.replace(AV, left=LEFT["hluq"])
    with pytest.raises(Unsupported, match="left operand of a convolution must be uniform, got hluq"):
        matmul = specs.make_linear("hluq", 4, 6, 3, RNG)
        dataclasses.replace(matmul, patches=Patches(6, (1, 1), (1, 1), (0, 0)))


@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40))
def test_signed_bits_is_the_least_width(a, b):
    lo, hi = min(a, b), max(a, b)
    width = signed_bits(lo, hi)
    assert -(2 ** (width - 1)) <= lo and hi < 2 ** (width - 1)
    assert width == 2 or not (-(2 ** (width - 2)) <= lo and hi < 2 ** (width - 2))


def test_the_width_needs_no_more_than_the_values(monkeypatch):
    """A weight of zeros needs no accumulator, whatever the codes are."""
    zeros = dataclasses.replace(WEIGHT, codes=np.tile(WEIGHT.zero_points[:, None], (1, 6)))
    assert accumulator_range(UniformOperand(4, FLOAT(1), 3), zeros, 6) == (0, 0)
