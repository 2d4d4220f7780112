# SPDX-License-Identifier: Apache-2.0
"""From a matmul of a spec to a command: its descriptor and what lies in memory for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export import Matmul, WeightOperand
from ahcq_plugin.export.golden import product_scale
from ahcq_plugin.export.operands import of_products
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine import layouts
from ahcq_plugin.hls.engine.config import (
    LANES,
    MAX_CHUNKS,
    PES,
    THRESHOLDS,
    EngineConfig,
)
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.destination import Destination, floats
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.parameters import parameter_words
from ahcq_plugin.hls.engine.shape import Shape, check_limits
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
        if self.matmul.kind == "qk":
            words = [layouts.right_words(product, self.slots, d.right_bits) for product in codes]
        else:
            words = [layouts.transposed_words(product, d.right_bits) for product in codes]
        image.write(d.right, np.stack(words))

    def read_output(self, image: Image) -> np.ndarray:
        """float32 (batch, m, n) of a command whose destination is ``floats`` or ``shorts``."""
        d = self.descriptor
        if self.destination.shorts:
            return self.read_sums(image).astype(np.float32) * of_products(product_scale(self.matmul), (d.batch,))
        words = image.read(d.out, self.destination.words).reshape(d.batch, d.m, -1)
        return words.view(np.float32)[..., : d.n]

    def read_sums(self, image: Image) -> np.ndarray:
        """int64 accumulators (batch, m, n) of a command whose destination is ``shorts``."""
        d = self.descriptor
        words = image.read(d.out, self.destination.words).reshape(d.batch, d.m, -1)
        return words.view(np.int16)[..., : d.n].astype(np.int64)


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
    shape = Shape.of(matmul, rows, batch)
    destination = destination or floats(shape.batch, shape.m, shape.n, shape.heads)
    shape.check(config, matmul.name)
    check_limits(
        matmul.name,
        ("thresholds of the output", len(destination.quantizers) << destination.bits, THRESHOLDS),
        ("chunks of columns", -(-shape.n // LANES) if destination.quantizers else 0, MAX_CHUNKS),
        ("bits of accumulators that are written with 16", matmul.accumulator_bits if destination.shorts else 0, 16),
    )
    slots, _ = fold_slots(matmul, LANES)
    if left is None:
        left = image.reserve(shape.batch * shape.m * shape.length * LANES)
    if isinstance(matmul.right, WeightOperand):
        right = image.place(layouts.right_words(matmul.right.codes, slots, matmul.right.bits))
    elif right is None:
        right = image.reserve(shape.batch * shape.tiles * shape.planes * shape.folds * PES)
    made = shape.descriptor(config)
    flags = made.flags | (fields.BARRIER if barrier else 0) | (fields.GELU if destination.activation == "gelu" else 0)
    made = dataclasses.replace(
        made,
        flags=flags,
        out_format=fields.CODES if destination.quantizers else fields.SHORTS if destination.shorts else fields.FLOATS,
        out_bits=destination.bits,
        quantizers=len(destination.quantizers),
        left=left,
        right=right,
        parameters=image.place(parameter_words(matmul, destination, shape.groups_passed(config))),
        out=image.reserve(destination.words),
    )
    return Command(matmul, made, slots, destination)


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
