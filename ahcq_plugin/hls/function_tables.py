# SPDX-License-Identifier: Apache-2.0
"""Tables of the kernels' GELU and exponential, which ``hls/include/ahcq/function_tables.h`` holds."""

from __future__ import annotations

import math

import numpy as np

from ahcq_plugin.hls.render import array, render

PER_UNIT = 32  # intervals of GELU's curve in a unit, and powers of two in an octave
GELU_END = 6


def gelu_tail(t: float) -> float:
    """``t * Phi(-t)``, what GELU takes off max(x, 0)."""
    return t * 0.5 * math.erfc(t / math.sqrt(2))


def gelu_curve() -> np.ndarray:
    """float32 (192, 3): coefficients of a parabola for each interval, lowest first.

    It goes through the Chebyshev nodes of the interval; the first one through both ends, so that GELU(0) is 0.
    """
    width = 1 / PER_UNIT
    chebyshev = width / 2 * (1 + np.cos((2 * np.arange(3) + 1) * np.pi / 6))
    curve = []
    for interval in range(GELU_END * PER_UNIT):
        nodes = chebyshev if interval else np.asarray([0, width / 2, width])
        values = [gelu_tail(interval * width + node) for node in nodes]
        curve.append(np.linalg.solve(np.vander(nodes, 3, increasing=True), values))
    return np.asarray(curve, np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """float32 GELU of float32 x, bit for bit what ``gelu.h`` computes (every operation rounds by itself)."""
    x = np.asarray(x, np.float32)
    size, positive, curve = np.abs(x), np.where(x < 0, np.float32(0), x), gelu_curve()
    inside = size < GELU_END
    interval = (np.where(inside, size, 0) * np.float32(PER_UNIT)).astype(np.int64)
    at = size - interval.astype(np.float32) / np.float32(PER_UNIT)
    constant, linear, square = curve[interval].transpose(-1, *range(x.ndim))
    with np.errstate(over="ignore", invalid="ignore"):  # of large x, which are beyond the curve
        return np.where(inside, positive - ((square * at + linear) * at + constant), positive)


def exp_powers() -> np.ndarray:
    """float32 (32,): ``2^(i / 32)``."""
    return np.asarray([2.0 ** (i / PER_UNIT) for i in range(PER_UNIT)], np.float32)


def render_function_tables() -> str:
    """The text of ``function_tables.h``."""
    curve = gelu_curve()
    values = dict(gelu_intervals=len(curve), gelu_curve=array(curve), exp_powers=array(exp_powers()))
    return render("function_tables.h.j2", values)
