# SPDX-License-Identifier: Apache-2.0
"""Test vectors of a matmul: random and directed codes, and floats that meet every corner of a quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import GroupedOperand, HLUQOperand, Matmul, PerHeadOperand, TableOperand, UniformOperand
from ahcq_plugin.export.matmul import heads_of
from ahcq_plugin.export.operands import Activation, of_products, top


@dataclass(frozen=True, eq=False)
class Vectors:
    """Codes for one launch of a layer.

    Attributes:
        left: integers (batch, rows, k).
        right: None for ``linear``, else (batch, n, k) for ``qk``, (batch, k, n) for ``av``.
    """

    left: np.ndarray
    right: np.ndarray | None = None


def make_vectors(matmul: Matmul, batch: int, rows: int, seed: int) -> Vectors:
    """``batch`` products (1 for ``linear``) of ``rows`` rows; every second row (and right operand) is directed.

    Of operands that are per head ``batch`` is rounded up to a multiple of the heads.
    """
    rng = np.random.default_rng(seed)
    heads = heads_of(matmul.left, matmul.right)
    batch = 1 if matmul.kind == "linear" else -(-batch // heads) * heads
    left = rng.integers(0, top(matmul.left.bits), (batch * rows, matmul.k), endpoint=True)
    directed = directed_rows(matmul, -(-len(left) // 2), rng)
    left[::2] = directed
    left = left.reshape(batch, rows, matmul.k)
    if matmul.kind == "linear":
        return Vectors(left)
    shape = (matmul.n, matmul.k) if matmul.kind == "qk" else (matmul.k, matmul.n)
    right = rng.integers(0, top(matmul.right.bits), (batch, *shape), endpoint=True)
    for item in range(0, batch, 2):  # lines of equal codes: the extremes, the zero point and its neighbours
        values = _special_codes(matmul.right)
        lines = values[(np.arange(matmul.n) + item) % len(values)]
        right[item] = np.broadcast_to(lines[:, None] if matmul.kind == "qk" else lines, shape)
    return Vectors(left, right)


def directed_rows(matmul: Matmul, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (count, k), of five kinds in turn.

    All k one special code; one special code in an otherwise zero row, at ends and group boundaries first; the largest
    sum that an output can reach; the smallest; special codes at random.
    """
    left, k = matmul.left, matmul.k
    special, zero = _special_codes(left), _zero_codes(left)
    places = _corner_places(left, k)
    low, high = _extreme_codes(left)
    rows = np.empty((count, k), np.int64)
    for index in range(count):
        turn, kind = divmod(index, 5)
        if kind == 0:
            rows[index] = special[turn % len(special)]
        elif kind == 1:
            rows[index] = zero
            place = places[turn % len(places)] if turn < 4 * len(places) else rng.integers(k)
            rows[index, place] = special[turn // len(places) % len(special)]
        elif kind in (2, 3):
            signs = _right_signs(matmul, int(rng.integers(matmul.n)), rng)
            rows[index] = np.where((signs > 0) == (kind == 2), high, low)
        else:
            rows[index] = rng.choice(special, k)
    return rows


def quantizer_values(operand: Activation, rows: int, length: int, seed: int) -> np.ndarray:
    """float32 (rows, length): every boundary or tie between codes, its neighbours, far values, and random ones.

    Of an operand that is per head two rows each are a product, head after head; ``rows`` is a multiple of both.
    """
    if isinstance(operand, PerHeadOperand):
        shape = (rows // 2, 2, length)
        scales, zeros = (of_products(v, shape[:1]) for v in (operand.scales, operand.zero_points))
        plain = UniformOperand(operand.bits, np.float32(1), 0)
        values = quantizer_values(plain, rows, length, seed).reshape(shape)
        with np.errstate(over="ignore"):  # far values become infinite, which saturate too
            return ((values - zeros.astype(np.float32)) * scales).reshape(rows, length)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, length)).astype(np.float32)
    if isinstance(operand, HLUQOperand | TableOperand):
        span = max(float(operand.boundaries[-1] - operand.boundaries[0]), float(operand.boundaries[-1]))
        values = (values * np.float32(span)).astype(np.float32) + operand.boundaries[0]
        ties = np.broadcast_to(operand.boundaries, (length, len(operand.boundaries)))
    else:
        codes = np.arange(-2, top(operand.bits) + 3, dtype=np.float64) + 0.5
        grouped = isinstance(operand, GroupedOperand)
        labels = operand.labels() if grouped else np.zeros(length, np.int64)
        scales = (operand.scales if grouped else np.asarray([operand.scale]))[labels]
        zeros = (operand.zero_points if grouped else np.asarray([operand.zero_point]))[labels]
        values *= scales * np.float32(2 ** (operand.bits - 1))
        ties = ((codes - zeros[:, None]) * scales[:, None].astype(np.float64)).astype(np.float32)
    inf = np.float32(np.inf)
    directed = np.concatenate(
        [ties, np.nextafter(ties, -inf), np.nextafter(ties, inf), np.full((length, 1), 3e38, np.float32),
         np.full((length, 1), -3e38, np.float32), np.zeros((length, 1), np.float32)], axis=1
    )  # fmt: skip
    turn = (np.arange(length) * 7 + np.arange(0, rows, 2)[:, None] * length) % directed.shape[1]
    values[::2] = directed[np.arange(length), turn]
    return values


def _special_codes(operand: Activation) -> np.ndarray:
    """The ends, the zero code and its neighbours; of hluq all codes around L, of a table all of few codes."""
    last = top(operand.bits)
    if isinstance(operand, HLUQOperand):
        middle = [operand.log_levels + step for step in (-1, 0, 1, 2)]
    elif isinstance(operand, TableOperand):
        middle = list(range(1, min(last, 16)))
    else:
        uniform = isinstance(operand, UniformOperand)
        zeros = [operand.zero_point] if uniform else operand.zero_points.tolist()
        middle = [zero + step for zero in zeros for step in (-1, 0, 1)]
    return np.asarray(sorted({0, last, 1, last - 1, *(code for code in middle if 0 <= code <= last)}))


def _zero_codes(left: Activation) -> np.ndarray | int:
    """The code of the value 0 (of a table: of its smallest entry; of heads: of the first), for each channel where they
    differ."""
    if isinstance(left, GroupedOperand):
        return left.zero_points[left.labels()]
    if isinstance(left, HLUQOperand):
        return left.log_levels
    if isinstance(left, PerHeadOperand):
        return int(left.zero_points[0])
    return left.zero_point if isinstance(left, UniformOperand) else int(np.argmin(left.table))


def _extreme_codes(left: Activation) -> tuple[int, int]:
    """The codes of the smallest and the largest operand."""
    if isinstance(left, TableOperand):
        return int(np.argmin(left.table)), int(np.argmax(left.table))
    return (left.log_levels if isinstance(left, HLUQOperand) else 0), top(left.bits)


def _corner_places(left: Activation, k: int) -> np.ndarray:
    """Channels at the ends, and on both sides of every group boundary."""
    if not isinstance(left, GroupedOperand):
        return np.unique([0, k // 2, k - 1])
    edges = np.concatenate([left.boundaries[:-1], left.boundaries[1:] - 1])
    return left.permutation[np.unique(edges)]


def _right_signs(matmul: Matmul, output: int, rng: np.random.Generator) -> np.ndarray:
    """(k,) positive where a larger left operand makes the output larger."""
    if matmul.kind != "linear":
        return rng.integers(0, 1, matmul.k, endpoint=True)
    return matmul.right.signed()[output]
