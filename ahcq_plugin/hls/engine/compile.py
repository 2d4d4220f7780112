# SPDX-License-Identifier: Apache-2.0
"""From a matmul of a spec to a command: its descriptor and what lies in memory for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import HLUQOperand, Matmul, SpecError, TableOperand, WeightOperand
from ahcq_plugin.export.golden import product_scale
from ahcq_plugin.export.matmul import heads_of, lane_tops
from ahcq_plugin.export.operands import of_products, top
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine import layouts
from ahcq_plugin.hls.engine.config import (
    LANES,
    MAX_CHUNKS,
    MAX_GROUPS,
    MAX_HEADS,
    NIBBLE,
    PES,
    THRESHOLDS,
    EngineConfig,
)
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.destination import Destination, floats
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.parameters import group_sizes, parameter_words
from ahcq_plugin.hls.layout import fold_slots


@dataclass(frozen=True, eq=False)
class Command:
    """A compiled matmul.

    Attributes:
        matmul: as the engine computes it; a convolution with groups has its whole weight here.
        descriptor: for the engine.
        slots: int64 (folds * 8,) channel of each place of a row, -1 for padding.
        destination: where the results go.
    """

    matmul: Matmul
    descriptor: Descriptor
    slots: np.ndarray
    destination: Destination

    def write_left(self, image: Image, codes: np.ndarray) -> None:
        """Codes (batch, m, k) of the left operand into memory."""
        d = self.descriptor
        rows = np.ascontiguousarray(codes).reshape(d.batch * d.m, d.k)
        image.write(d.left, layouts.left_words(rows, self.slots, d.left_bits))

    def write_right(self, image: Image, codes: np.ndarray) -> None:
        """Codes of a run-time right operand, (batch, n, k) of qk, (batch, k, n) of av, into memory."""
        d = self.descriptor
        columns = codes if self.matmul.kind == "qk" else codes.swapaxes(-1, -2)
        words = [layouts.right_words(product, self.slots, d.right_bits) for product in columns]
        image.write(d.right, np.stack(words))

    def read_output(self, image: Image) -> np.ndarray:
        """float32 (batch, m, n) of a command whose destination is ``floats`` or ``shorts``."""
        d = self.descriptor
        words = image.read(d.out, self.destination.words).reshape(d.batch, d.m, -1)
        if not self.destination.shorts:
            return words.view(np.float32)[..., : d.n]
        sums = words.view(np.int16)[..., : d.n].astype(np.float32)
        return sums * of_products(product_scale(self.matmul), (d.batch,))


def compile_matmul(
    matmul: Matmul,
    image: Image,
    config: EngineConfig,
    rows: int | None = None,
    batch: int | None = None,
    destination: Destination | None = None,
    left: int | None = None,
    right: int | None = None,
    barrier: bool = True,
) -> Command:
    """A command for ``matmul``, with its weights and parameters in ``image``.

    Args:
        rows, batch: of this launch; None: those of the spec.
        destination: of the results; None: float32.
        left, right: addresses of run-time operands that earlier commands write; None: new pieces of memory.
        barrier: whether it waits for the results of all earlier commands.
    Raises:
        SpecError: it does not fit the engine; says what is too large for what.
    """
    matmul = whole_weight(matmul)
    m, batch = rows or matmul.m, 1 if matmul.kind == "linear" else batch or matmul.batch
    slots, group_folds = fold_slots(matmul, LANES)
    folds, heads = len(slots) // LANES, heads_of(matmul.left, matmul.right)
    destination = destination or floats(batch, m, matmul.n, heads)
    check_fits(matmul, config, destination)
    if left is None:
        left = image.reserve(batch * m * layouts.row_beats(folds, matmul.left.bits) * LANES)
    if isinstance(matmul.right, WeightOperand):
        right = image.place(layouts.right_words(matmul.right.codes, slots, matmul.right.bits))
    elif right is None:
        right = image.reserve(batch * -(-matmul.n // PES) * layouts.planes_of(matmul.right.bits) * folds * PES)
    made = shape_descriptor(matmul, config, m, batch, folds)
    flags = made.flags | (fields.BARRIER if barrier else 0) | (fields.GELU if destination.gelu else 0)
    made = dataclasses.replace(
        made,
        flags=flags,
        out_format=fields.CODES if destination.quantizers else fields.SHORTS if destination.shorts else fields.FLOATS,
        out_bits=destination.bits,
        quantizers=len(destination.quantizers),
        left=left,
        right=right,
        parameters=image.place(parameter_words(matmul, destination)),
        out=image.reserve(destination.words),
    )
    return Command(matmul, made, slots, destination)


def shape_descriptor(matmul: Matmul, config: EngineConfig, m: int, batch: int, folds: int) -> Descriptor:
    """The descriptor of a launch without addresses and destination: shapes, passes, blocks, intervals."""
    left, right = matmul.left, matmul.right
    tiles, planes = -(-matmul.n // PES), layouts.planes_of(right.bits)
    digits = passes(matmul, config)
    length = layouts.row_beats(folds, left.bits)
    most = config.left_depth // length
    blocks = -(-m // (most * config.cells))
    steps = -(-m // (blocks * config.cells))
    turns = steps * folds * planes * digits  # of a tile
    family = fields.HLUQ if isinstance(left, HLUQOperand) else fields.TABLE if isinstance(left, TableOperand) else 0
    product = matmul.kind != "linear"
    flags = fields.PRODUCT if product else fields.OFFSET if family else 0
    return Descriptor(
        version=fields.VERSION,
        family=family,
        flags=flags,
        out_format=fields.FLOATS,
        left_bits=left.bits,
        right_bits=right.bits,
        digits=digits,
        log_levels=left.log_levels if isinstance(left, HLUQOperand) else 0,
        out_bits=0,
        left_interval=_interval(turns * tiles, steps * config.cells * length),
        right_interval=_interval(turns, folds * planes * LANES),
        quantizers=0,
        groups=len(group_sizes(matmul)),
        heads=heads_of(left, right),
        m=m,
        k=matmul.k,
        n=matmul.n,
        batch=batch,
        left=0,
        right=0,
        parameters=0,
        out=0,
        folds=folds,
        block_rows=steps * config.cells,
    )


def passes(matmul: Matmul, config: EngineConfig) -> int:
    """How many digits the widest left operand of the multipliers has."""
    return max(1, -(-lane_tops(matmul.left)[0].bit_length() // config.digit))


def whole_weight(matmul: Matmul) -> Matmul:
    """A convolution with groups as one without: outside of its group an output's weight is its zero point."""
    if matmul.patches is None or matmul.patches.groups == 1:
        return matmul
    right = matmul.right
    assert isinstance(right, WeightOperand)  # a convolution has a constant weight
    codes = np.repeat(right.zero_points[:, None], matmul.row_length, axis=1)
    of_group = np.arange(matmul.n) // (matmul.n // matmul.groups)
    columns = of_group[:, None] * matmul.k + np.arange(matmul.k)
    np.put_along_axis(codes, columns, right.codes, axis=1)
    whole = dataclasses.replace(right, codes=codes)
    patches = dataclasses.replace(matmul.patches, groups=1)
    return dataclasses.replace(matmul, k=matmul.row_length, right=whole, patches=patches)


def columns_of(matmul: Matmul, begin: int, end: int) -> Matmul:
    """The outputs ``begin`` to ``end`` - 1 of a matmul with a constant weight: q, k or v of a joint projection."""
    part, right = slice(begin, end), matmul.right
    assert isinstance(right, WeightOperand) and matmul.bias is not None
    right = dataclasses.replace(
        right, codes=right.codes[part], scales=right.scales[part], zero_points=right.zero_points[part]
    )
    return dataclasses.replace(matmul, n=end - begin, right=right, bias=matmul.bias[part])


def check_fits(matmul: Matmul, config: EngineConfig, destination: Destination) -> None:
    """SpecError where a memory or an accumulator of the engine is too small for ``matmul``."""
    folds = len(fold_slots(matmul, LANES)[0]) // LANES
    left, right = matmul.left, matmul.right
    limit = 2 ** (config.accumulator_bits - 1)
    most_digit = min(lane_tops(left)[0], top(config.digit))
    sums = [matmul.k * most_digit * min(top(right.bits), top(NIBBLE))]
    if isinstance(left, HLUQOperand):
        sums.append(matmul.k * lane_tops(left)[1] * min(top(right.bits), top(NIBBLE)))
    for what, got, most in (
        ("the left buffer: beats of a row", layouts.row_beats(folds, left.bits), config.left_depth),
        ("the right buffer: folds", folds * layouts.planes_of(right.bits), config.right_depth),
        ("an accumulator: largest sum", max(sums), limit - 1),
        ("bits of accumulators that are written with 16", matmul.accumulator_bits if destination.shorts else 0, 16),
        ("groups", len(group_sizes(matmul)), MAX_GROUPS),
        ("heads", heads_of(left, right), MAX_HEADS),
        ("thresholds of the output", len(destination.quantizers) << destination.bits, THRESHOLDS),
        ("chunks of columns", -(-matmul.n // LANES) if destination.quantizers else 0, MAX_CHUNKS),
    ):
        if got > most:
            raise SpecError(f"matmul '{matmul.name}' does not fit the engine, {what}: got {got}, at most {most}")


def _interval(turns: int, loads: int) -> int:
    return min(255, max(1, turns // loads))
