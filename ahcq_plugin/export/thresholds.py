# SPDX-License-Identifier: Apache-2.0
"""Quantizers as thresholds on an integer key of the float: exact, and no divider in hardware."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.operands import HLUQOperand, TableOperand, UniformOperand, top

INFINITY_KEY = 0x7F800000


def float_keys(values: np.ndarray) -> np.ndarray:
    """int64 keys of float32 values, ordered as these are; both zeros have the key 0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits == -(2**31), 0, np.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def key_floats(keys: np.ndarray) -> np.ndarray:
    """float32 values of keys (the inverse of ``float_keys``; key 0 is +0)."""
    keys = np.asarray(keys, np.int64)
    return np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32).view(np.float32)


def relu_keys(keys: np.ndarray) -> np.ndarray:
    """The keys of "ReLU, then a quantizer" from those of the quantizer: what 0 reaches, everything reaches."""
    return np.where(keys <= 0, -(2**31), keys)


def rank_keys(operand: UniformOperand | HLUQOperand | TableOperand) -> tuple[np.ndarray, np.ndarray]:
    """(keys int64 (2^bits - 1,), codes int64 (2^bits,)): x has the rank "number of keys <= key(x)", the rank its code.

    Of a uniform operand key j belongs to the least float32 whose code is above j, found by bisection over the keys with
    ``codes.encode`` itself; a code that no finite value reaches begins at infinity.
    """
    if not isinstance(operand, UniformOperand):
        return float_keys(operand.boundaries), operand.rank_codes
    wanted = np.arange(1, top(operand.bits) + 1)
    low = np.full(len(wanted), -INFINITY_KEY - 1, np.int64)  # below the code wanted; minus infinity has code 0
    high = np.full(len(wanted), INFINITY_KEY, np.int64)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = encode(operand, key_floats(middle)) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high, np.arange(top(operand.bits) + 1)
