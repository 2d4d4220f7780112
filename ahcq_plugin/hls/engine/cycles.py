# SPDX-License-Identifier: Apache-2.0
"""How many cycles a command takes: turns of every process, exactly; cycles from the slowest of them, tile by tile.

Each process makes one turn a cycle at most. ``process_turns`` counts what the C++ simulation counts. ``cycles`` adds,
for each tile, the largest of what the cells, the buffers, the processes behind the cells and the DDR need for it, and
what no tile hides: the first block and tile, the last results, the pipelines' latency; of the RTL, whose FIFOs hold two
words, also what cells wait for while `correct` and then `dequantize` load the parameters of a tile. Nothing of a
command is left out; of two commands the second waits for the first (as with BARRIER).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine.config import CHUNKS, GELUS, LANES, PES, EngineConfig
from ahcq_plugin.hls.engine.layouts import row_beats
from ahcq_plugin.hls.engine.shape import Shape, last_chunks
from ahcq_plugin.hls.engine.softmax_command import Positions

CLOCK_HZ = 300e6
BEAT = 32  # bytes
HEADER_BEATS, SCALE_BEATS = 2, 3 * CHUNKS
#: Of a command that waits for the one before, in the simulation: descriptor, parameters, results that are under way.
LATENCY = 40
#: Stages of the pipelines from descriptor to response, which the RTL has and the C++ simulation has not.
STAGES = 40
#: Of a softmax, from the launch to the last response, beside its turns: descriptor, parameters, stages.
SOFTMAX_LATENCY = 30
#: Passes whose sums can wait behind the cells: what is left to do when the cells have ended.
WAITING = 3
#: Turns of `dequantize` that it still has work for when `correct` loads parameters.
BETWEEN = 2 * CHUNKS + 4


@dataclass(frozen=True)
class DDR:
    """Memory behind the ports.

    Attributes:
        bytes_per_second: of all ports together; 64-bit DDR4-2400 moves 19.2e9 at best, 12e9 is what is left of it.
        granule: bytes that one access moves at least, a burst of eight on 64 bits.
        latency: cycles from an address to its first beat, beyond one. A command waits for two of them, one after the
            other: its descriptor, its operands.
    """

    bytes_per_second: float = 12e9
    granule: int = 64
    latency: int = 0

    @property
    def bytes_per_cycle(self) -> float:
        """At 300 MHz."""
        return self.bytes_per_second / CLOCK_HZ


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        format: as in the descriptor: floats, codes, shorts.
        bits: of codes.
        scattered: codes go to folds of columns (k of Q.K^T), a granule each, instead of rows.
        gelu: before it is quantized; a cell has units for ``GELUS`` of a chunk's outputs a turn.
    """

    format: int = fields.FLOATS
    bits: int = 0
    scattered: bool = False
    gelu: bool = False

    @property
    def planes(self) -> int:
        """Turns of ``write`` for a chunk."""
        return 2 if self.format == fields.CODES and self.bits > 4 else 1

    @property
    def gelu_turns(self) -> int:
        """Turns of a unit for a chunk."""
        return LANES // GELUS if self.gelu else 0

    def row_bytes(self, chunks: int, ddr: DDR) -> float:
        """Bytes that the DDR moves for ``chunks`` chunks of one row, whole granules where they are scattered."""
        if self.scattered:
            return chunks * self.planes * ddr.granule
        chunk = {fields.FLOATS: BEAT, fields.SHORTS: BEAT / 2, fields.CODES: BEAT / LANES * self.planes}[self.format]
        return math.ceil(chunks * chunk / ddr.granule) * ddr.granule


@dataclass(frozen=True)
class Cycles:
    """Of one command.

    Attributes:
        cycles: from its fetch to its last result.
        macs: M K N of its products, each multiplication once whatever the passes.
        ddr_bytes: moved.
        limits: what set the pace -> cycles of tiles where it did: ``cells``, ``left``, ``right``, ``output``, ``ddr``
            (of a softmax ``scores``, ``ddr``); and ``start``, which nothing hides.
    """

    cycles: int
    macs: int
    ddr_bytes: int
    limits: dict[str, int]

    def utilisation(self, config: EngineConfig) -> float:
        """``macs / (cycles * processing elements * inputs)``."""
        return self.macs / (self.cycles * config.lanes)


def _blocks(shape: Shape, block_rows: int, cells: int) -> list[tuple[int, int]]:
    """(rows, steps) of each block of a product."""
    rows = [min(block_rows, shape.m - first) for first in range(0, shape.m, block_rows)]
    return [(count, -(-count // cells)) for count in rows]


def _phases(works: Iterator[tuple[int, int]], interval: int) -> Iterator[int]:
    """Turns of each phase of a double buffer: (turns of the cells, beats that fill the other half) -> turns."""
    pause = 0
    for turns, beats in works:
        early = min(beats, (turns - 1 - pause) // interval + 1 if turns > pause else 0)
        length = turns + beats - early
        if beats > early:
            pause = interval - 1
        elif beats:
            pause = max(0, interval - 1 - (turns - 1 - (pause + (beats - 1) * interval)))
        else:
            pause = max(0, pause - turns)
        yield length


def process_turns(shape: Shape, config: EngineConfig, output: Output | None = None) -> dict[str, int]:
    """Turns of every process for one command; of processes that each cell has, those of one cell together."""
    output, d = output or Output(), shape.descriptor(config)
    blocks = _blocks(shape, d.block_rows, config.cells)
    product = shape.kind != "linear"
    steps = sum(count for _, count in blocks) * shape.batch * shape.tiles
    tile_loads = len(blocks) * shape.tiles * shape.batch
    row_chunks = (shape.tiles - 1) * CHUNKS + last_chunks(shape.n, d.groups)
    chunks = steps // shape.tiles * row_chunks
    passes, group_passes = shape.passes(config), shape.group_passes(config)
    corrections = 0 if product else CHUNKS * (1 + 2 * d.groups) * tile_loads
    scales = 0 if product else SCALE_BEATS * tile_loads
    sums = sum(_sum_steps(shape, block) for block in range(len(blocks))) * shape.batch * shape.tiles
    sum_chunks = sums // shape.tiles * row_chunks
    turns = (steps + sums) * shape.folds * passes
    return dict(
        request=tile_loads,
        walk_steps=steps + sums,
        walk_passes=(steps + sums) * group_passes,
        walk_folds=turns,
        place_left=shape.batch * shape.m * shape.length,
        buffer_left=sum(_phases(_left_works(shape, config, blocks), d.left_interval)),
        buffer_right=sum(_phases(_right_works(shape, config, blocks), d.right_interval)),
        decode=turns,
        multiply=turns * CHUNKS,
        correct=(chunks + sum_chunks) * group_passes + corrections,
        dequantize=_dequantize_turns(shape, config, steps, chunks) + scales,
        dequantize_lane=_dequantize_turns(shape, config, steps, chunks) * LANES,
        gelu_unit=chunks * output.gelu_turns * GELUS,
        quantize=chunks,
        write=chunks * output.planes,
    )


def _dequantize_turns(shape: Shape, config: EngineConfig, steps: int, chunks: int) -> int:
    """Turns of ``dequantize`` for sums, without its parameters.

    Of a step a stage for each group, for the shift lanes of hluq, offsets (hluq, table), and weight scales with biases;
    each has ``CHUNKS`` turns, the last one as many as there are chunks.
    """
    product = shape.kind != "linear"
    offsets = not product and shape.family in ("hluq", "table")
    shifts = shape.family == "hluq" and config.shifts
    stages = shape.groups_passed(config) + shifts + offsets + (not product)
    return steps * CHUNKS * (stages - 1) + chunks


def _left_works(shape: Shape, config: EngineConfig, blocks: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What the left buffer does in each phase: turns of a block, beats of the next."""
    per_step = shape.tiles * shape.folds * shape.passes(config)
    before = 0
    for _ in range(shape.batch):
        for block, (rows, steps) in enumerate(blocks):
            yield before, rows * shape.length
            before = (steps + _sum_steps(shape, block)) * per_step
    yield before, 0


def _right_works(shape: Shape, config: EngineConfig, blocks: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same of the right buffer: turns of a tile, beats of the next. One tile stays for all blocks of a product."""
    beats = shape.folds * shape.planes * CHUNKS
    per_step = shape.folds * shape.passes(config)
    whole = [(sum(rows for rows, _ in blocks), sum(steps for _, steps in blocks))] if shape.tiles == 1 else blocks
    sums, before = _sum_steps(shape), 0
    for _ in range(shape.batch):
        for _, steps in whole:
            for _ in range(shape.tiles):
                yield before, beats
                before = (steps + sums) * per_step
    yield before, 0


def _sum_steps(shape: Shape, block: int = 0) -> int:
    """Steps of a row of ones before those of a tile of a block: run-time columns whose sums a left zero point needs.

    One tile stays for all blocks.
    """
    wanted = shape.kind != "linear" and shape.family not in ("hluq", "table")
    return int(wanted and (block == 0 or shape.tiles > 1))


@lru_cache(maxsize=4096)  # layers repeat
def cycles(
    shape: Shape, config: EngineConfig, output: Output | None = None, ddr: DDR | None = None, stages: int = STAGES
) -> Cycles:
    """The model of the module's text.

    Args:
        output: what is written, and how; None: float32.
        ddr: None: 12e9 bytes a second.
        stages: of the pipelines; 0 for the C++ simulation.
    """
    output, ddr, d = output or Output(), ddr or DDR(), shape.descriptor(config)
    blocks = _blocks(shape, d.block_rows, config.cells)
    product = shape.kind != "linear"
    passes = shape.passes(config)
    right_beats = shape.folds * shape.planes * CHUNKS
    corrections = 0 if product else CHUNKS * (1 + 2 * d.groups)
    of_correct = shape.group_passes(config)
    behind = max(of_correct, output.planes, output.gelu_turns)  # turns a chunk of the slowest process behind a cell
    limits: Counter[str] = Counter()
    moved = 0.0

    def tile_cycles(block: int, tile: int, is_last: bool, times: int) -> str:
        nonlocal moved
        (rows, steps), sums = blocks[block], _sum_steps(shape, block)
        left = 0 if is_last else rows * shape.length  # of the next block, which is about as large
        right = 0 if is_last else -(-right_beats // len(blocks)) if shape.tiles == 1 else right_beats
        chunks = min(CHUNKS, -(-(shape.n - tile * PES) // LANES))
        handled = last_chunks(shape.n, d.groups) if tile == shape.tiles - 1 else CHUNKS
        of_tile = 0 if product or is_last else corrections + SCALE_BEATS
        amount = rows * output.row_bytes(chunks, ddr) + BEAT * (left / shape.tiles + right + of_tile)
        follows = stages and not product and (block, tile) != (0, 0)
        loads = corrections + SCALE_BEATS + 2 * handled + 3 if follows else 0
        # while `dequantize` waits: `correct` loads, but for what lies in between; or has the row of ones
        sums_wait = max(0, corrections - BETWEEN) if follows else sums * of_correct * handled
        scales_wait = 0 if product else SCALE_BEATS
        needs = dict(
            cells=(steps + sums) * shape.folds * passes + max(0, loads - WAITING * shape.folds // len(shape.groups)),
            output=max(
                (steps * behind + sums * of_correct) * handled + (corrections if follows or not stages else 0),
                _dequantize_turns(shape, config, steps, steps * handled) + sums_wait + scales_wait,
            ),
            left=-(-left // shape.tiles),
            right=right,
            ddr=math.ceil(amount / ddr.bytes_per_cycle),
        )
        slowest = max(needs, key=lambda name: needs[name])
        limits[slowest] += needs[slowest] * times
        moved += amount * times
        return slowest

    for block in range(len(blocks)):
        for tile in range(shape.tiles):
            is_last = block == len(blocks) - 1 and tile == shape.tiles - 1
            tile_cycles(block, tile, False, shape.batch - is_last)
    end = tile_cycles(len(blocks) - 1, shape.tiles - 1, True, 1)
    first = blocks[0][0] * shape.length
    parameter_beats = HEADER_BEATS + -(-d.groups // LANES) + (d.heads if product else d.groups)
    parameter_beats += 0 if product else corrections + SCALE_BEATS
    before = (first + right_beats + parameter_beats) * BEAT
    table = 2**shape.left_bits if stages and shape.family == "table" else 0  # an entry a turn
    filled = math.ceil(max(first, right_beats, table, before / ddr.bytes_per_cycle))
    last_sums = 0 if end == "output" else min(behind, WAITING) * CHUNKS
    limits["start"] = filled + LATENCY + last_sums + stages + 2 * ddr.latency
    return Cycles(sum(limits.values()), shape.macs, int(moved + before), dict(limits))


def softmax_cycles(
    shape: tuple[int, int, int],
    bits: int,
    quantizers: int,
    heads: int,
    ddr: DDR | None = None,
    positions: Positions | None = None,
) -> Cycles:
    """Of a softmax command: eight scores a turn, behind its parameters, a row that waits for its largest score and one
    that waits for its sum.

    Args:
        shape: (products, rows, scores of a row).
        bits, quantizers: of the codes. heads: with a scale of their own.
        ddr: None: 12e9 bytes a second.
        positions: that are added to the scores, a beat of their terms a turn.
    """
    (batch, m, n), ddr = shape, ddr or DDR()
    rows, chunks = batch * m, -(-n // LANES)
    terms = 0 if positions is None else positions.row_beats + positions.column_beats
    ranks = 2 * -(-(quantizers << bits) // LANES)  # beats, a word a turn
    scores = 2 * -(-n // (4 * LANES))
    moved = BEAT * (rows * (scores + 2 * -(-terms // 2) + row_beats(chunks, bits)) + ranks + -(-heads // LANES))
    needs = dict(scores=rows * (chunks + terms), ddr=math.ceil(moved / ddr.bytes_per_cycle))
    slowest = max(needs, key=lambda name: needs[name])
    start = SOFTMAX_LATENCY + 2 * chunks + LANES * ranks + 2 * ddr.latency
    limits = {slowest: needs[slowest], "start": start}
    return Cycles(sum(limits.values()), 0, moved, limits)
