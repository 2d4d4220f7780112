# SPDX-License-Identifier: Apache-2.0
"""A softmax on integers (``export/table_softmax.py``) as a command of the engine: scores and codes in its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import SpecError
from ahcq_plugin.export.table_softmax import TableSoftmax
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine import layouts
from ahcq_plugin.hls.engine.config import LANES, EngineConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.destination import shorts
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.shape import check_limits

#: Of ``softmax.h``: longest row, bounds of all quantizers together, heads with constants of their own.
ROW, BOUNDS, HEADS = 4096, 256, 64
#: Least and largest width of the picture of keys, most rows of it, bits of a term without its sign.
LEAST_WIDTH, SIDE, TERM_BITS = LANES, 64, 29


@dataclass(frozen=True)
class Positions:
    """Relative positions: a term for each row and one for each column of the picture of keys, added to scores.

    Attributes:
        width, height: of the picture; key i is in its row i // width.
        bits: fraction bits that the scores get.
    """

    width: int
    height: int
    bits: int

    @property
    def row_beats(self) -> int:
        """Beats of the terms of rows."""
        return -(-self.height // LANES)

    @property
    def column_beats(self) -> int:
        """Beats of the terms of columns, as often as fills whole beats: each turn reads one."""
        return math.lcm(self.width, LANES) // LANES

    def words(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """uint32 (..., words) of int64 terms (..., height) and (..., width)."""
        padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -self.height % LANES)])
        repeated = np.tile(columns, LANES * self.column_beats // self.width)
        return np.concatenate([padded, repeated], axis=-1).astype(np.int32).view(np.uint32)


def find_positions(
    terms: tuple[np.ndarray, ...], bits: int, known: Positions | None = None
) -> tuple[Positions, np.ndarray, np.ndarray]:
    """The layout of two terms (..., m, n) of scores; then those of rows (..., m, height), of columns (..., m, width).

    Args:
        bits: fraction bits of the scores.
        known: the layout that it has to be.
    Raises:
        SpecError: they are not of rows and columns of a picture, or too large; says what is too large for what.
    """
    of_rows, of_columns = terms
    n = of_rows.shape[-1]

    def fits(width: int) -> bool:
        rows, columns = np.repeat(of_rows[..., ::width], width, -1), np.tile(of_columns[..., :width], n // width)
        return np.array_equal(rows, of_rows) and np.array_equal(columns, of_columns)

    widths = [width for width in range(1, n + 1) if n % width == 0 and fits(width)]
    if not widths:
        raise SpecError("the terms added to its scores are not of rows and columns")
    taken = [width for width in widths if LEAST_WIDTH <= width <= SIDE and n // width <= SIDE]
    if not taken:
        picture = f"{n // widths[0]} x {widths[0]}"
        raise SpecError(f"its keys are a picture of {picture}, the engine takes 1 x {LANES} to {SIDE} x {SIDE}")
    width = taken[0] if known is None else known.width
    found = Positions(width, n // width, bits)
    if width not in taken or known not in (None, found):
        raise SpecError("its terms are of another picture of keys than those before")
    rows, columns = of_rows[..., ::width], of_columns[..., :width]
    largest = max(int(np.abs(one).max()) for one in (rows, columns))
    if largest >> TERM_BITS:
        raise SpecError(f"its terms have {largest.bit_length()} bits, the engine adds {TERM_BITS}")
    return found, rows, columns


@dataclass(frozen=True, eq=False)
class SoftmaxCommand:
    """A compiled softmax.

    Attributes:
        step: its constants.
        descriptor: for the engine.
        positions: that are added to the scores, or None.
    """

    step: TableSoftmax
    descriptor: Descriptor
    positions: Positions | None = None

    @property
    def words(self) -> int:
        """Of the piece of memory that gets the codes."""
        d = self.descriptor
        return _code_words(d.batch * d.m, d.n, d.out_bits)

    def write_scores(self, image: Image, scores: np.ndarray) -> None:
        """Integers of 16 bits (batch, m, n) into memory, as Q.K^T writes them."""
        d = self.descriptor
        words = shorts(d.batch, d.m, d.n).words
        rows = np.zeros((d.batch * d.m, 2 * words // (d.batch * d.m)), np.int16)
        rows[:, : d.n] = scores.reshape(-1, d.n)
        image.write(d.left, rows.view(np.uint32))

    def write_terms(self, image: Image, rows: np.ndarray, columns: np.ndarray) -> None:
        """Terms of rows (batch, m, height) and columns (batch, m, width) of the picture of keys into memory."""
        assert self.positions is not None  # or there is no place for them
        image.write(self.descriptor.right, self.positions.words(rows, columns))

    def read_codes(self, image: Image) -> np.ndarray:
        """int64 codes (batch, m, n)."""
        d = self.descriptor
        words = image.read(d.out, self.words).reshape(d.batch * d.m, -1)
        slots = np.pad(np.arange(d.n), (0, -d.n % LANES), constant_values=-1)
        return layouts.left_codes(words, slots, d.out_bits).reshape(d.batch, d.m, d.n)


def compile_softmax(
    name: str,
    step: TableSoftmax,
    image: Image,
    config: EngineConfig,
    shape: tuple[int, int, int],
    scores: int | None = None,
    barrier: bool = True,
    positions: Positions | None = None,
) -> SoftmaxCommand:
    """A command for ``step``, with its parameters in ``image``; the codes lie as the left operand of A.V.

    Args:
        name: of the quantizer behind it, for messages.
        shape: (batch, m, n) of the scores; product i is of head i % heads.
        scores: address of accumulators of 16 bits that Q.K^T writes (``destination.shorts``); None: a new piece.
        barrier: whether it waits for the results of all earlier commands.
        positions: that are added to the scores; ``write_terms`` brings them.
    Raises:
        SpecError: the engine has no unit for softmax, or it does not fit; says what is too large for what.
    """
    batch, m, n = shape
    check_step(name, step, shape)
    if not config.softmax:
        raise SpecError(f"softmax '{name}': the engine has no unit for it, its configuration needs softmax=True")
    bits = len(step.rank_codes).bit_length() - 1
    terms = dict.fromkeys(("k", "right", "digits", "blocks", "folds"), 0)
    if positions is not None:
        beats = positions.row_beats + positions.column_beats
        terms = dict(k=positions.width, right=image.reserve(batch * m * beats * LANES), digits=positions.bits)
        terms |= dict(blocks=positions.row_beats, folds=positions.column_beats)
    made = Descriptor(
        version=fields.VERSION,
        flags=fields.SOFTMAX | (fields.BARRIER if barrier else 0),
        out_format=fields.CODES,
        out_bits=bits,
        quantizers=len(step.bounds),
        heads=len(step.mantissas),
        m=m,
        n=n,
        batch=batch,
        left=image.reserve(shorts(batch, m, n).words) if scores is None else scores,
        parameters=image.place(np.concatenate([factor_beats(step), rank_beats(step)])),
        out=image.reserve(_code_words(batch * m, n, bits)),
        **terms,
        **dict.fromkeys(fields.UNKNOWN_TO_SOFTMAX, 0),
    )
    return SoftmaxCommand(step, made, positions)


def check_step(name: str, step: TableSoftmax, shape: tuple[int, ...]) -> None:
    """SpecError unless the processes of ``softmax.h`` hold it; ``shape`` is (products, rows, columns) of the scores."""
    heads, (quantizers, bounds) = len(step.mantissas), step.bounds.shape
    if len(shape) != 3 or 0 in shape or shape[0] % heads:
        raise SpecError(
            f"softmax '{name}': scores must be (products of {heads} heads, rows, columns), none 0, got {shape}"
        )
    check_limits(
        name, ("scores of a row", shape[2], ROW), ("bounds of the codes", quantizers * (bounds + 1), BOUNDS),
        ("heads", heads, HEADS),
    )  # fmt: skip


def factor_beats(step: TableSoftmax) -> np.ndarray:
    """uint32 (beats, 8): of each head the mantissa and, above its 24 bits, the shift less 1."""
    return _beats(step.mantissas | (step.shifts - 1) << 24)


def rank_beats(step: TableSoftmax) -> np.ndarray:
    """uint32 (beats, 8): bounds, 2^bits words a quantizer of which the first is unused; then the codes of the ranks."""
    keys = np.concatenate([np.zeros((len(step.bounds), 1), np.int64), step.bounds], axis=1)
    return np.concatenate([_beats(keys.ravel()), _beats(np.tile(step.rank_codes, len(step.bounds)))])


def _beats(words: np.ndarray) -> np.ndarray:
    filled = np.zeros(-(-len(words) // LANES) * LANES, np.uint32)
    filled[: len(words)] = words
    return filled.reshape(-1, LANES)


def _code_words(rows: int, n: int, bits: int) -> int:
    return rows * layouts.row_beats(-(-n // LANES), bits) * LANES
