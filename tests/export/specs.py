# SPDX-License-Identifier: Apache-2.0
"""Random operands, matmuls and specs of every family; a plain integer reference of what they compute."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ahcq_plugin.export.matmul import Matmul, accumulator_range, heads_of, signed_bits
from ahcq_plugin.export.operands import (
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    TableOperand,
    UniformOperand,
    WeightOperand,
)

LEFT_FAMILIES = ("uniform", "grouped", "hluq", "table")
#: (kind, family of the left operand, of the right one) of products of two activations; the first two without heads.
PRODUCTS = (
    ("qk", "uniform", "uniform"),
    ("av", "table", "uniform"),
    ("qk", "per_head", "per_head"),
    ("qk", "uniform", "per_head"),
    ("av", "table", "per_head"),
    ("av", "per_head", "uniform"),
)
HEADS = 3


def make_scale(rng: np.random.Generator) -> np.float32:
    return np.float32(2.0 ** rng.uniform(-9, 1))


def make_left(family: str, bits: int, k: int, rng: np.random.Generator, offset: bool = True):
    """A random left operand."""
    top = 2**bits - 1
    thresholds = np.sort(rng.normal(size=top)).astype(np.float32)
    if family == "uniform":
        return UniformOperand(bits, make_scale(rng), int(rng.integers(top + 1)))
    if family == "per_head":
        scales = np.array([make_scale(rng) for _ in range(HEADS)], np.float32)
        return PerHeadOperand(bits, scales, rng.integers(0, top + 1, HEADS))
    if family == "grouped":
        groups = int(rng.integers(1, min(k, 5) + 1))
        cuts = np.sort(rng.choice(np.arange(1, k), groups - 1, replace=False)) if groups > 1 else np.empty(0, np.int64)
        bounds = np.concatenate([[0], cuts, [k]]).astype(np.int64)
        scales = np.array([make_scale(rng) for _ in range(groups)], np.float32)
        zeros = rng.integers(0, top + 1, groups)
        return GroupedOperand(bits, rng.permutation(k).astype(np.int64), bounds, scales, zeros)
    if family == "hluq":
        split = int(rng.integers(1, min(16, 2**bits - 2) + 1))
        return HLUQOperand(bits, np.float32(-rng.random()), make_scale(rng), make_scale(rng), split, thresholds)
    table = np.sort(rng.integers(0, 2**16 + 1, top + 1)) * (np.arange(top + 1) > 0)  # all families have a level 0
    codes = np.arange(top, -1, -1) if rng.random() < 0.5 else np.arange(top + 1)
    shift = np.float32(rng.normal()) if offset else np.float32(0)
    return TableOperand(bits, thresholds, codes, table[np.argsort(codes)], make_scale(rng), shift)


def make_weight(bits: int, n: int, k: int, rng: np.random.Generator) -> WeightOperand:
    scales = np.array([make_scale(rng) for _ in range(n)], np.float32)
    return WeightOperand(bits, rng.integers(0, 2**bits, (n, k)), scales, rng.integers(0, 2**bits, n))


def make_linear(family: str, bits: int, k: int, n: int, rng: np.random.Generator, w_bits: int | None = None) -> Matmul:
    left, right = make_left(family, bits, k, rng), make_weight(w_bits or bits, n, k, rng)
    bias = rng.normal(size=n).astype(np.float32)
    width = signed_bits(*accumulator_range(left, right, k))
    return Matmul("matmul_1", "linear", "fc", 1, 4, k, n, left, right, bias, width)


def make_product(
    kind: str, family: str, bits: int, k: int, n: int, rng: np.random.Generator, right_family: str = "uniform"
) -> Matmul:
    left, right = make_left(family, bits, k, rng, offset=False), make_left(right_family, bits, k, rng)
    width = signed_bits(*accumulator_range(left, right, k))
    return Matmul("matmul_1", kind, "", 2 * heads_of(left, right), 4, k, n, left, right, None, width)


def exact_value(operand, code: int, channel: int = 0, product: int = 0) -> Fraction:
    """What a code of an activation stands for, as an exact rational number."""
    if isinstance(operand, PerHeadOperand):
        head = product % operand.heads
        return (code - int(operand.zero_points[head])) * Fraction(float(operand.scales[head]))
    if isinstance(operand, UniformOperand):
        return (code - operand.zero_point) * Fraction(float(operand.scale))
    if isinstance(operand, GroupedOperand):
        position = list(operand.permutation).index(channel)
        group = max(g for g in range(operand.groups) if operand.boundaries[g] <= position)
        return (code - int(operand.zero_points[group])) * Fraction(float(operand.scales[group]))
    offset = Fraction(float(operand.offset))
    if isinstance(operand, TableOperand):
        return offset + int(operand.table[code]) * Fraction(float(operand.unit))
    split, power = operand.log_levels, Fraction(float(operand.scale_log))
    if code < split:
        return offset + power / 2**code
    return offset + (0 if code == split else power + (code - split) * Fraction(float(operand.scale_uniform)))
