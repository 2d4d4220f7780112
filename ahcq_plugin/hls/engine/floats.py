# SPDX-License-Identifier: Apache-2.0
"""Matmuls of float32 for the engine that those of codes are compared with: layouts, descriptors, and what it computes.

The order of sums is part of the definition: a fold of eight products is added as a tree, folds one after the other;
each operation rounds half to even, and subnormals are zeros before and after it in RTL (docs/hls_rtl.md); C++ keeps
them. GELU is the one of codes, ``function_tables.gelu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export.operands import SpecError
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine.config import CHUNKS, LANES, PES, ROWS, FloatConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.destination import Destination, floats
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.shape import check_limits, interval

_LEAST = np.float32(2.0**-126)


def left_words(values: np.ndarray) -> np.ndarray:
    """uint32 (rows, words) of float32 (rows, k): zeros to whole folds of eight."""
    return np.pad(np.asarray(values, np.float32), ((0, 0), (0, -values.shape[1] % LANES))).view(np.uint32)


def right_words(values: np.ndarray) -> np.ndarray:
    """uint32 (tiles, k, 64) of float32 (n, k): eight columns of one k a beat, k to whole folds, n to whole tiles."""
    n, k = values.shape
    padded = np.pad(np.asarray(values, np.float32), ((0, -n % PES), (0, -k % LANES)))
    return np.ascontiguousarray(padded.reshape(-1, PES, padded.shape[1]).swapaxes(1, 2)).view(np.uint32)


def flushed(values: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros of their sign."""
    values = np.asarray(values, np.float32)
    return np.where(np.abs(values) < _LEAST, np.copysign(np.float32(0), values), values)


def matmul(left: np.ndarray, right: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """float32 (batch, m, n) of left (batch, m, k), right (batch, n, k) and a bias (n,), in the engine's order."""
    pad = ((0, 0), (0, 0), (0, -left.shape[2] % LANES))
    a, b = (flushed(np.pad(np.asarray(x, np.float32), pad)) for x in (left, right))
    total = np.zeros((*left.shape[:2], right.shape[1]), np.float32)
    for first in range(0, a.shape[2], LANES):
        terms = [flushed(a[:, :, None, i] * b[:, None, :, i]) for i in range(first, first + LANES)]
        while len(terms) > 1:
            terms = [flushed(x + y) for x, y in zip(terms[::2], terms[1::2], strict=True)]
        total = terms[0] if first == 0 else flushed(total + terms[0])
    return total if bias is None else flushed(total + flushed(bias))


@dataclass(frozen=True, eq=False)
class FloatCommand:
    """A compiled matmul of float32.

    Attributes:
        descriptor: for the engine.
        destination: where the results go.
    """

    descriptor: Descriptor
    destination: Destination

    def write_left(self, image: Image, values: np.ndarray) -> None:
        """float32 (batch, m, k) of the left operand into memory."""
        image.write(self.descriptor.left, left_words(values.reshape(-1, values.shape[-1])))

    def write_right(self, image: Image, values: np.ndarray) -> None:
        """float32 (batch, n, k) of the right operand into memory."""
        image.write(self.descriptor.right, np.stack([right_words(product) for product in values]))

    def read_output(self, image: Image) -> np.ndarray:
        """float32 (batch, m, n) of a command whose destination is ``destination.floats``."""
        d = self.descriptor
        words = image.read(d.out, self.destination.words).reshape(d.batch, d.m, -1)
        return words.view(np.float32)[..., : d.n]


def compile_floats(
    shape: tuple[int, int, int, int],
    image: Image,
    config: FloatConfig,
    bias: np.ndarray | None = None,
    gelu: bool = False,
    destination: Destination | None = None,
    left: int | None = None,
    right: int | None = None,
    barrier: bool = True,
) -> FloatCommand:
    """A command, with its parameters in ``image``.

    Args:
        shape: (batch, m, k, n).
        bias: float32 (n,); None: a product of run-time operands, which has none. With a bias ``batch`` is 1.
        destination: of the results; None: ``destination.floats``.
        left, right: addresses of operands that earlier commands write; None: new pieces of memory.
        barrier: whether it waits for the results of all earlier commands.
    Raises:
        SpecError: it does not fit the engine; says what is too large for what.
    """
    batch, m, k, n = shape
    if bias is not None and (batch != 1 or np.shape(bias) != (n,)):
        raise SpecError(f"a bias must have shape ({n},), and one product, got {np.shape(bias)} and {batch} products")
    folds, tiles, of_step = -(-k // LANES), -(-n // PES), ROWS * config.cells
    most = config.left_depth // folds // ROWS  # steps of ROWS rows that a cell's left buffer holds
    name = f"float32 {m} x {k} x {n}"
    check_limits(
        name,
        ("the left buffer: beats of eight rows", ROWS * folds, config.left_depth),
        ("the right buffer: folds", folds, config.right_depth),
    )
    blocks = -(-m // (most * of_step))
    steps = -(-m // (blocks * of_step))
    rows = steps * of_step
    blocks = -(-m // rows)
    turns = steps * ROWS * folds  # of a tile
    destination = destination or floats(batch, m, n)
    parts = [destination.strides.header()]
    if bias is not None:
        parts.append(np.pad(np.asarray(bias, np.float32), (0, -n % PES)).view(np.uint32))
    flags = (fields.PRODUCT if bias is None else 0) | (fields.BARRIER if barrier else 0) | (fields.GELU if gelu else 0)
    made = Descriptor(
        version=fields.VERSION,
        family=fields.UNIFORM,
        flags=flags,
        out_format=fields.FLOATS,
        left_bits=4,  # not looked at, as are all fields of codes
        right_bits=4,
        digits=1,
        log_levels=0,
        out_bits=0,
        left_interval=interval(turns * tiles, rows * folds),
        right_interval=interval(turns, folds * LANES * CHUNKS),
        quantizers=0,
        groups=1,
        heads=1,
        m=m,
        k=k,
        n=n,
        batch=batch,
        left=image.reserve(batch * m * folds * LANES) if left is None else left,
        right=image.reserve(batch * tiles * folds * LANES * PES) if right is None else right,
        parameters=image.place(np.concatenate(parts)),
        out=image.reserve(destination.words),
        folds=folds,
        block_rows=rows,
        blocks=blocks,
        steps=steps,
        last_steps=-(-((m - 1) % rows + 1) // of_step),
    )
    return FloatCommand(made, destination)
