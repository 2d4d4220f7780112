# SPDX-License-Identifier: Apache-2.0
"""Softmax and its quantizer on integers, with two tables and without a division: from scores to codes (numpy).

A step of its own beside the golden model, which leaves softmax to floating point; docs/softmax.md is its definition.
``>>`` rounds down, ``rint`` half to even; tables and constants are made offline, exactly rounded:

========== ===========================================================================================
constants  ``scale * log2(e) = mantissa * 2^(-16 - shift)`` of the row's head, mantissa rounded to 24 bits
pass 0     ``top``, the largest score of the row (found while the row arrives)
pass 1     ``d = min(top - score, 2^24 - 1)``; ``x = min((d * mantissa + 2^(shift - 1)) >> shift, LIMIT)``, an
           exponent in 2^-16 octaves; then ``u = (x + 32) >> 6`` and ``sum += (POWERS[u % 1024] << 13) >> (u >> 10)``
once       ``n = floor(log2(sum))``, ``f = (sum >> (n - 20)) % 2^20``, ``i = f >> 12``, ``log = ((n - 30) << 16) +
           LOGS[i] + (((LOGS[i + 1] - LOGS[i]) * (f % 4096) + 2048) >> 12)``; 0 where the sum is 0
pass 2     ``y = x + log``: -log2 of the probability; rank = how many bounds are > y; ``rank_codes[rank]``
========== ===========================================================================================

``POWERS[f] = rint(2^(17 - f / 1024))``, ``LOGS[i] = rint(2^16 * log2(1 + i / 256))``. A masked score (``MASKED``) and
one 128 octaves or more below the top have x = LIMIT: they add nothing and take the code of the probability 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from ahcq_plugin.export.operands import (
    Activation,
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    UniformOperand,
)
from ahcq_plugin.export.thresholds import key_floats, rank_keys

#: A score that takes no part, as minus infinity does.
MASKED = -(2**31)
FRACTION_BITS = 16  # of exponents and logarithms, in octaves
INDEX_BITS, LOG_INDEX_BITS = 10, 8  # of the two tables
POWER_BITS, ONE_BITS = 17, 30  # 2^0 in the table of powers, and in a sum
SIGNIFICAND_BITS = 20  # of a sum, behind its first 1
MANTISSA_BITS, MAX_SHIFT = 24, 50
MAX_DIFFERENCE = 2**24 - 1
#: The exponent of what counts as 0.
LIMIT = 2 ** (7 + FRACTION_BITS) - 1
#: A bound that every probability reaches, also 0.
ALWAYS = 2 ** (8 + FRACTION_BITS) - 1
MAX_ROW = 2**16
#: How far y may be from -log2 of the exact probability, in 2^-16 octaves, in rows of up to 4096 scores.
ERROR_BOUND = 40
_PIECE = 2**20  # scores at a time


@cache
def powers() -> np.ndarray:
    """int64 (1024,) ``POWERS``: 2^-f of the fraction f / 1024, 18 bits unsigned."""
    return np.rint(np.exp2(POWER_BITS - np.arange(2**INDEX_BITS) / 2**INDEX_BITS)).astype(np.int64)


@cache
def logs() -> np.ndarray:
    """int64 (257,) ``LOGS``, 17 bits unsigned."""
    return np.rint(2**FRACTION_BITS * np.log2(1 + np.arange(2**LOG_INDEX_BITS + 1) / 2**LOG_INDEX_BITS)).astype(
        np.int64
    )


def factor(scale: float) -> tuple[int, int]:
    """(mantissa, shift): ``scale * log2(e) = mantissa * 2^(-16 - shift)``, mantissa rounded to 24 bits, half to even.

    shift is 1 to 50; at 50 the mantissa is as small as the scale asks for, at 1 what is larger has the largest (a score
    below the top then counts as 0 either way).

    Raises:
        SpecError: the scale is not positive and finite.
    """
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise SpecError(f"the scale of scores must be a positive finite number, got {scale!r}")
    with localcontext() as context:
        context.prec = 60
        octaves = Decimal(float(scale)) / Decimal(2).ln()
        exponent = math.frexp(float(octaves))[1]
        shift = min(max(MANTISSA_BITS - exponent - FRACTION_BITS, 1), MAX_SHIFT)
        mantissa = int((octaves * Decimal(2) ** (FRACTION_BITS + shift)).to_integral_value())
    if mantissa == 2**MANTISSA_BITS and shift > 1:  # rounded up to the next power of two
        mantissa, shift = mantissa // 2, shift - 1
    return min(mantissa, 2**MANTISSA_BITS - 1), shift


def bounds(operand: UniformOperand | HLUQOperand | TableOperand) -> np.ndarray:
    """int64 (2^bits - 1,), descending: a probability 2^(-y / 2^16) has the rank "how many bounds are > y".

    Bound j is the least y whose probability lies below t, the least float32 of rank j + 1 (``rank_keys``):
    ``floor(-log2(t) * 2^16) + 1`` exactly, 0 where t is above 1. It is ``ALWAYS`` where t is 0 or negative, else at
    most LIMIT, so that what counts as 0 has the code of 0.
    """
    with localcontext() as context:
        context.prec = 40
        return np.array([_bound(float(value)) for value in key_floats(rank_keys(operand)[0])], np.int64)


def _bound(threshold: float) -> int:
    if threshold <= 0:
        return ALWAYS
    if threshold > 1:
        return 0
    part, exponent = math.frexp(threshold)  # a power of two is exact, another logarithm is irrational
    octaves = -exponent - (Decimal(part).ln() / Decimal(2).ln() if part != 0.5 else -1)
    return min(int(octaves * 2**FRACTION_BITS) + 1, LIMIT)


def score_bits(scales: np.ndarray) -> int:
    """How many fraction bits scores get where other terms (positions) are added to the accumulators.

    0 to 12: the fewest with which a unit of every head is at most 2^-12 octaves.
    """
    largest = float(np.max(scales)) * math.log2(math.e)
    return min(max(12 + math.frexp(largest)[1] - (math.frexp(largest)[0] == 0.5), 0), 12)


@dataclass(frozen=True, eq=False)
class TableSoftmax:
    """Constants of one attention.

    Attributes:
        mantissas, shifts: int64 (H,): of the scale of each head.
        bounds: int64 (H or 1, 2^bits - 1), descending along a row.
        rank_codes: int64 (2^bits,): code of each rank.
    """

    mantissas: np.ndarray
    shifts: np.ndarray
    bounds: np.ndarray
    rank_codes: np.ndarray

    @classmethod
    def of(cls, scales: Sequence[float] | np.ndarray, quantizer: Activation) -> TableSoftmax:
        """Constants for scores that are worth ``scales`` (H,) a unit, and the quantizer of the probabilities.

        Raises:
            SpecError: a scale that is not positive and finite; another number of heads than the quantizer has; a
                quantizer with groups of channels.
        """
        made = [factor(float(scale)) for scale in scales]
        heads: Sequence[UniformOperand | HLUQOperand | TableOperand]
        if isinstance(quantizer, PerHeadOperand):
            if quantizer.heads != len(made):
                raise SpecError(f"the quantizer has {quantizer.heads} heads, the scores have {len(made)}")
            grids = zip(quantizer.scales, quantizer.zero_points.tolist(), strict=True)
            heads = [UniformOperand(quantizer.bits, scale, zero_point) for scale, zero_point in grids]
        elif isinstance(quantizer, GroupedOperand):
            raise SpecError("probabilities have no channels: their quantizer must not be of the family grouped")
        else:
            heads = [quantizer]
        mantissas, shifts = np.array(made, np.int64).T
        return cls(mantissas, shifts, np.stack([bounds(head) for head in heads]), rank_keys(heads[0])[1])

    def run(self, scores: np.ndarray, heads: np.ndarray | None = None) -> np.ndarray:
        """int64 codes of the probabilities, same shape.

        Args:
            scores: integers (..., n) in (-2^31, 2^31), or ``MASKED``; a row is the last axis.
            heads: integers (...): head of each row; None: all rows are of head 0.
        Raises:
            SpecError: no integers, a score out of range, an empty row or one longer than 2^16.
        """
        scores = np.asarray(scores)
        if not np.issubdtype(scores.dtype, np.integer) or scores.ndim < 1 or not 1 <= scores.shape[-1] <= MAX_ROW:
            raise SpecError(f"scores must be integers (..., 1 to {MAX_ROW}), got {scores.dtype} {scores.shape}")
        if scores.size and (scores.min() < MASKED or scores.max() > -MASKED - 1):
            raise SpecError(f"scores must have 32 bits, got [{scores.min()}, {scores.max()}]")
        rows = scores.reshape(-1, scores.shape[-1])
        of_row = np.zeros(len(rows), np.int64) if heads is None else np.asarray(heads).reshape(-1)
        codes = np.empty(rows.shape, np.int64)
        step = max(1, _PIECE // rows.shape[1])
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            codes[part] = self.rank_codes[self._ranks(rows[part].astype(np.int64), of_row[part])]
        return codes.reshape(scores.shape)

    def _ranks(self, scores: np.ndarray, heads: np.ndarray) -> np.ndarray:
        exponents = self.exponents(scores, heads)
        keys = exponents + log_sums(exponents)[:, None]
        if len(self.bounds) == 1:
            return _rank(self.bounds[0], keys)
        ranks = np.empty_like(keys)
        for head in np.unique(heads):
            ranks[heads == head] = _rank(self.bounds[head], keys[heads == head])
        return ranks

    def exponents(self, scores: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """int64 (rows, n) x of int64 scores (rows, n), heads (rows,)."""
        mantissa, shift = self.mantissas[heads][:, None], self.shifts[heads][:, None]
        difference = np.minimum(scores.max(1, keepdims=True) - scores, MAX_DIFFERENCE)
        scaled = (difference * mantissa + (1 << (shift - 1))) >> shift
        return np.where(scores == MASKED, LIMIT, np.minimum(scaled, LIMIT))


def log_sums(exponents: np.ndarray) -> np.ndarray:
    """int64 (rows,) log2 of the sums of 2^-x of each row, in 2^-16 octaves; 0 of rows that have no score."""
    coarse = FRACTION_BITS - INDEX_BITS
    index = (exponents + (1 << (coarse - 1))) >> coarse
    terms = powers()[index % 2**INDEX_BITS] << (ONE_BITS - POWER_BITS)
    sums = (terms >> np.minimum(index >> INDEX_BITS, 63)).sum(1)
    some = np.maximum(sums, 1 << ONE_BITS)  # the largest term of a row alone is that
    first = np.frexp(some.astype(np.float64))[1].astype(np.int64) - 1  # exact: sums are below 2^47
    fraction = (some >> (first - SIGNIFICAND_BITS)) % 2**SIGNIFICAND_BITS
    fine = SIGNIFICAND_BITS - LOG_INDEX_BITS
    low = fraction >> fine
    rise = (logs()[low + 1] - logs()[low]) * (fraction % 2**fine)
    return ((first - ONE_BITS) << FRACTION_BITS) + logs()[low] + ((rise + (1 << (fine - 1))) >> fine)


def _rank(descending: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How many of the bounds are above each key."""
    return len(descending) - np.searchsorted(descending[::-1], keys, side="right")
