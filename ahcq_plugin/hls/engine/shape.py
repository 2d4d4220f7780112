# SPDX-License-Identifier: Apache-2.0
"""What a launch of a matmul asks of the engine: sizes, passes, blocks; with the numbers of a spec or without them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ahcq_plugin.export import HLUQOperand, Matmul, SpecError
from ahcq_plugin.export.matmul import heads_of, lane_tops
from ahcq_plugin.export.operands import top
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine.config import CHUNKS, LANES, MAX_GROUPS, MAX_HEADS, NIBBLE, PES, SUM_BITS, EngineConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.layouts import planes_of, row_beats
from ahcq_plugin.hls.engine.parameters import group_sizes

_FAMILIES = {"hluq": fields.HLUQ, "table": fields.TABLE}


@dataclass(frozen=True)
class Shape:
    """A launch.

    Attributes:
        kind: ``linear``, ``qk`` or ``av``.
        family: of the left operand.
        left_bits, right_bits: of the codes.
        left_top: largest operand of the multipliers.
        log_levels: L of hluq, else 0.
        groups: sizes of the groups of left channels.
        heads: with parameters of their own, else 1.
        batch, m, n: products, rows and columns of each.
    """

    kind: str
    family: str
    left_bits: int
    right_bits: int
    left_top: int
    log_levels: int
    groups: tuple[int, ...]
    heads: int
    batch: int
    m: int
    n: int

    @classmethod
    def of(cls, matmul: Matmul, m: int | None = None, batch: int | None = None) -> Shape:
        """Of a matmul without groups of a convolution, for ``m`` rows and ``batch`` products, else the spec's."""
        left = matmul.left
        return cls(
            matmul.kind,
            left.family,
            left.bits,
            matmul.right.bits,
            lane_tops(left)[0],
            left.log_levels if isinstance(left, HLUQOperand) else 0,
            tuple(group_sizes(matmul).tolist()),
            heads_of(left, matmul.right),
            1 if matmul.kind == "linear" else batch or matmul.batch,
            m or matmul.m,
            matmul.n,
        )

    @property
    def k(self) -> int:
        """Codes of a row."""
        return sum(self.groups)

    @property
    def macs(self) -> int:
        """Multiply-accumulates: M K N of every product, each counted once."""
        return self.batch * self.m * self.k * self.n

    @cached_property
    def folds(self) -> int:
        """Of a row; each group begins with one of its own."""
        return sum(-(-size // LANES) for size in self.groups)

    @property
    def planes(self) -> int:
        """Nibbles of the right codes, which lie one behind the other in memory."""
        return planes_of(self.right_bits)

    def planes_passed(self, config: EngineConfig) -> int:
        """Passes over the right codes."""
        return -(-self.planes * NIBBLE // config.plane)

    @property
    def tiles(self) -> int:
        """Of 64 columns."""
        return -(-self.n // PES)

    @property
    def length(self) -> int:
        """Beats of a row of left codes."""
        return row_beats(self.folds, self.left_bits)

    def splits(self, config: EngineConfig) -> bool:
        """Whether the log codes of HLUQ are a second group of passes over the same codes."""
        return self.family == "hluq" and not config.shifts

    def groups_passed(self, config: EngineConfig) -> int:
        """Groups of passes of a row."""
        return 2 if self.splits(config) else len(self.groups)

    def digits(self, config: EngineConfig) -> int:
        """Passes over the digits of the left operand."""
        largest = max(self.left_top, 2**self.log_levels // 2 if self.splits(config) else 0)
        return max(1, -(-largest.bit_length() // config.digit))

    def passes(self, config: EngineConfig) -> int:
        """Turns of the cells for each fold of a row."""
        first = -(-self.left_bits // config.digit) if self.splits(config) else 0
        return self.planes_passed(config) * (first + self.digits(config))

    def group_passes(self, config: EngineConfig) -> int:
        """Passes of a row, each over the folds of a group."""
        return self.passes(config) * (1 if self.splits(config) else len(self.groups))

    def check(self, config: EngineConfig, name: str) -> None:
        """SpecError where a memory or an accumulator of the engine is too small; ``name`` is the matmul's."""
        plane = min(top(self.right_bits), top(config.plane))
        sums = self.k * plane * max(min(self.left_top, top(config.digit)), 2**self.log_levels // 2)
        left_top = max(self.left_top, 2**self.log_levels // 2)
        check_limits(
            name,
            ("the left buffer: beats of a row", self.length, config.left_depth),
            ("the right buffer: folds", self.folds * self.planes_passed(config), config.right_depth),
            ("an accumulator: largest sum", sums, 2 ** (config.accumulator_bits - 1) - 1),
            (
                "registers behind the cells: largest sum",
                self.k * left_top * top(self.right_bits),
                2 ** (SUM_BITS - 2) - 1,
            ),
            ("the sum of a row: largest", self.k * left_top, 2**32 - 1),
            ("groups", len(self.groups), MAX_GROUPS),
            ("heads", self.heads, MAX_HEADS),
        )

    def descriptor(self, config: EngineConfig) -> Descriptor:
        """Without addresses and destination. Blocks are as few as fit the left buffer, and of equal size."""
        cells, digits = config.cells, self.digits(config)
        blocks = -(-self.m // (config.left_depth // self.length * cells))
        steps = -(-self.m // (blocks * cells))
        turns = steps * self.folds * self.passes(config)  # of a tile
        family = _FAMILIES.get(self.family, fields.UNIFORM)
        flags = fields.PRODUCT if self.kind != "linear" else fields.OFFSET if family else 0
        if self.kind == "av":
            flags |= fields.TRANSPOSED
        return Descriptor(
            version=fields.VERSION,
            family=family,
            flags=flags,
            out_format=fields.FLOATS,
            left_bits=self.left_bits,
            right_bits=self.right_bits,
            digits=digits,
            log_levels=self.log_levels,
            out_bits=0,
            left_interval=interval(turns * self.tiles, steps * cells * self.length),
            right_interval=interval(turns, self.folds * self.planes * LANES),
            quantizers=0,
            groups=self.groups_passed(config),
            heads=self.heads,
            m=self.m,
            k=self.k,
            n=self.n,
            batch=self.batch,
            left=0,
            right=0,
            parameters=0,
            out=0,
            folds=self.folds,
            block_rows=steps * cells,
            blocks=-(-self.m // (steps * cells)),
            steps=steps,
            last_steps=-(-((self.m - 1) % (steps * cells) + 1) // cells),
        )


def last_chunks(n: int, groups: int) -> int:
    """Chunks of the last tile that the processes behind the cells handle: those with outputs, with groups all."""
    return -(-((n - 1) % PES + 1) // LANES) if groups == 1 else CHUNKS


def check_limits(name: str, *limits: tuple[str, int, int]) -> None:
    """SpecError for the first of (what, got, most) that is too large."""
    for what, got, most in limits:
        if got > most:
            raise SpecError(f"matmul '{name}' does not fit the engine, {what}: got {got}, at most {most}")


def interval(turns: int, loads: int) -> int:
    """Turns of the cells from one beat that fills a buffer to the next, if ``loads`` beats come in ``turns``."""
    return min(255, max(1, turns // loads))
