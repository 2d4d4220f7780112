# SPDX-License-Identifier: Apache-2.0
"""Large non-negative operands as sums of 8-bit digits times constants, and sums of products that fit int32.

A product of 8-bit numbers is summed in int32 registers. Operands beyond 255 (the shift lane of HLUQ, the tables of LNQ
and AGQ) become ``sum_d factor_d * digit_d`` with digits in [0, 255], exactly; each digit is multiplied by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DIGIT_TOP = 255
INT32_TOP = 2**31 - 1
_BASES_TRIED = 64


@dataclass(frozen=True, eq=False)
class Digits:
    """``values[c] = sum_d factors[d] * tables[d, c]``.

    Attributes:
        factors: int64 (D,), positive.
        tables: uint8 (D, codes).
    """

    factors: np.ndarray
    tables: np.ndarray

    def __len__(self) -> int:
        return len(self.factors)

    def tops(self) -> list[int]:
        """Largest value of each digit."""
        return [int(table.max(initial=0)) for table in self.tables]


def split(values: np.ndarray) -> Digits:
    """The digits of a table of operands, as few as this method finds.

    A common power of two is taken out first. What then exceeds 255 takes two digits where some base B gives
    ``values = B * high + low`` with both in [0, 255] (2^16, the largest level of LNQ, is ``257 * 255 + 1``); else
    digits of base 256.

    Args:
        values: int64 (codes,), each at least 0.
    """
    if not len(values) or values.min() < 0:
        raise ValueError(f"operands must be a table of integers >= 0, got {values[:8]}")
    common = int(np.bitwise_or.reduce(values))
    shift = (common & -common).bit_length() - 1 if common else 0
    rest = values >> shift
    found = _two_digits(rest) if rest.max() > DIGIT_TOP else (np.ones(1, np.int64), rest[None])
    if found is None:
        count = -(-int(rest.max()).bit_length() // 8)
        places = 8 * np.arange(count, dtype=np.int64)
        found = np.left_shift(1, places), (rest[None] >> places[:, None]) & DIGIT_TOP
    factors, tables = found
    return Digits(factors << shift, tables.astype(np.uint8))


def _two_digits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors and digits of ``base * high + low``; None where no base fits all values."""
    least = -(-(int(values.max()) - DIGIT_TOP) // DIGIT_TOP)
    for base in range(max(least, 1), least + _BASES_TRIED):
        high = np.minimum(values // base, DIGIT_TOP)
        low = values - base * high
        if low.max() <= DIGIT_TOP:
            return np.array([base, 1], np.int64), np.stack([high, low])
    return None


def safe_length(left_top: int, right_top: int) -> int:
    """The greatest number of products ``left * right``, ``0 <= left <= left_top`` and ``|right| <= right_top``, whose
    sum fits int32 in any order."""
    return INT32_TOP // max(1, left_top * right_top)
