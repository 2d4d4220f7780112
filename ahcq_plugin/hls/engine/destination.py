# SPDX-License-Identifier: Apache-2.0
"""Where results go: strides of rows and chunks, so that codes lie as the next matmul reads them.

Word address of chunk c (eight columns) of row r of product i, heads h = i % heads, w = r // window_rows, v = r %
window_rows: ``out + h * head + i // heads * product + w * window + v % 64 * row + v // 64 * row64 + c //
segment_chunks * segment + c % segment_chunks * chunk``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export.operands import HLUQOperand, TableOperand, UniformOperand
from ahcq_plugin.hls.engine.config import LANES, PES
from ahcq_plugin.hls.engine.layouts import planes_of, row_beats

NO_WINDOWS = 2**31
GRANULE = 16  # words of a DDR access
Quantizer = UniformOperand | HLUQOperand | TableOperand


@dataclass(frozen=True)
class Strides:
    """In words of 32 bits; see the module. ``plane`` is from the low nibbles of a fold to the high ones."""

    row: int
    row64: int
    chunk: int
    segment: int = 0
    segment_chunks: int = NO_WINDOWS
    window: int = 0
    window_rows: int = NO_WINDOWS
    plane: int = 0
    head: int = 0
    product: int = 0

    def header(self) -> np.ndarray:
        """uint32 (16,): the two beats that the engine reads."""
        values = [self.row, self.row64, self.chunk, self.segment, self.segment_chunks, self.window, self.window_rows]
        return np.array([*values, self.plane, self.head, self.product, *[0] * 6], np.uint32)


@dataclass(frozen=True, eq=False)
class Destination:
    """What becomes of the float32 results of a command.

    Attributes:
        strides: where they go.
        words: size of the piece of memory.
        quantizers: none: floats. Else codes of one of these (of equal bits) for each chunk.
        selector: int64, the quantizer of each chunk of columns.
        activation: "", "gelu" or, of codes, "relu": what comes first. ReLU is in the thresholds.
        shorts: accumulators of 16 bits instead, which whoever reads them multiplies by the product's scale.
    """

    strides: Strides
    words: int
    quantizers: tuple[Quantizer, ...] = ()
    selector: np.ndarray | None = None
    activation: str = ""
    shorts: bool = False

    @property
    def bits(self) -> int:
        """Of the codes; 0 of floats."""
        return self.quantizers[0].bits if self.quantizers else 0


def floats(batch: int, m: int, n: int, heads: int = 1) -> Destination:
    """float32 (batch, m, n rounded up to 16), in C order: rows begin with a granule of the DDR, 64 bytes."""
    row = -(-n // GRANULE) * GRANULE
    return Destination(Strides(row, 64 * row, LANES, head=m * row, product=heads * m * row), batch * m * row)


def shorts(batch: int, m: int, n: int, heads: int = 1) -> Destination:
    """int16 accumulators of products (batch, m, n rounded up to 32), in C order: half of what floats take."""
    row = -(-n // (2 * GRANULE)) * GRANULE
    strides = Strides(row, 64 * row, LANES // 2, head=m * row, product=heads * m * row)
    return Destination(strides, batch * m * row, shorts=True)


def left_rows(m: int, n: int, quantizer: Quantizer, activation: str = "") -> Destination:
    """Codes of (m, n) as the rows of the next matmul's left operand."""
    folds, planes = -(-n // LANES), planes_of(quantizer.bits)
    row = row_beats(folds, quantizer.bits) * LANES
    strides = Strides(row, 64 * row, planes, plane=1)
    selector = np.zeros(-(-n // PES) * LANES, np.int64)
    return Destination(strides, m * row, (quantizer,), selector, activation)


@dataclass(frozen=True, eq=False)
class Segment:
    """Columns of one projection (q, k, v) that become operands of the products of H heads.

    Attributes:
        side: ``left`` (q) or ``right`` (k) of Q.K^T, or ``values`` (v) of A.V.
        quantizers: one, or one for each head.
    """

    side: str
    quantizers: tuple[Quantizer, ...]


def head_operands(rows: int, window_rows: int, n: int, heads: int, segment: Segment) -> Destination:
    """Codes of a projection (rows, n) as operands of the products of its heads.

    Rows are windows of ``window_rows`` tokens; product i is window i // heads, head i % heads, as Q.K^T takes them. The
    columns of a head are neighbours, a multiple of eight.
    """
    windows, chunks = rows // window_rows, n // heads // LANES
    bits = segment.quantizers[0].bits
    planes = planes_of(bits)
    if segment.side == "left":
        row = row_beats(chunks, bits) * LANES
        size = window_rows * row
        strides = Strides(row, 64 * row, planes, size, chunks, heads * size, window_rows, plane=1)
    elif segment.side == "values":
        row = -(-chunks // LANES) * LANES
        plane = -(-window_rows // LANES) * LANES * row
        size = planes * plane
        strides = Strides(row, 64 * row, 1, size, chunks, heads * size, window_rows, plane=plane)
    else:
        tile = planes * chunks * PES
        size = -(-window_rows // PES) * tile
        strides = Strides(1, tile, PES, size, chunks, heads * size, window_rows, plane=chunks * PES)
    selector = np.zeros(-(-n // PES) * LANES, np.int64)
    if len(segment.quantizers) > 1:
        selector[: heads * chunks] = np.repeat(np.arange(heads), chunks)
    return Destination(strides, windows * heads * size, segment.quantizers, selector)


def merged_heads(windows: int, heads: int, m: int, n: int, quantizer: Quantizer) -> Destination:
    """Codes of A.V, (windows * heads, m, n), as rows (windows * m, heads * n) of the next matmul's left operand.

    ``n`` is a multiple of eight; head after head.
    """
    chunks, planes = n // LANES, planes_of(quantizer.bits)
    row = row_beats(heads * chunks, quantizer.bits) * LANES
    strides = Strides(row, 64 * row, planes, plane=1, head=chunks * planes, product=m * row)
    selector = np.zeros(-(-n // PES) * LANES, np.int64)
    return Destination(strides, windows * m * row, (quantizer,), selector)
