# SPDX-License-Identifier: Apache-2.0
"""The 64-byte descriptor of a command, a matmul or a softmax: every field, little endian (docs/engine.md)."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass, fields

from ahcq_plugin.export import SpecError

VERSION = 3  # 1 had no SOFTMAX, 2 no terms of it
SIZE = 64
UNIFORM, HLUQ, TABLE = 0, 1, 2
PRODUCT, BARRIER, GELU, OFFSET, TRANSPOSED, SOFTMAX = 1, 2, 4, 8, 16, 32
FLOATS, CODES, SHORTS = 0, 1, 2

_FORMAT = struct.Struct("<12B2H8I5H6x")
_COUNTS = ("folds", "block_rows", "blocks", "steps", "last_steps")
_WORDS = ("m", "k", "n", "batch", "left", "right", "parameters", "out")
_OF_BOTH = (("version", VERSION, VERSION), ("heads", 1, 64), *((name, 1, 2**32 - 1) for name in ("m", "n", "batch")))
_OF_MATMUL = (
    ("family", UNIFORM, TABLE),
    ("flags", 0, PRODUCT | BARRIER | GELU | OFFSET | TRANSPOSED),
    ("out_format", FLOATS, SHORTS),
    ("left_bits", 2, 8),
    ("right_bits", 2, 8),
    ("digits", 1, 8),
    ("left_interval", 1, 255),
    ("right_interval", 1, 255),
    ("groups", 1, 64),
    *((name, 1, 2**16 - 1) for name in _COUNTS),
    ("k", 1, 2**32 - 1),
)
#: Fields that a softmax does not have.
UNKNOWN_TO_SOFTMAX = ("family", "left_bits", "right_bits", "log_levels", "left_interval", "right_interval", "groups")
UNKNOWN_TO_SOFTMAX += ("block_rows", "steps", "last_steps")
_OF_SOFTMAX = (
    ("out_format", CODES, CODES),
    ("out_bits", 2, 8),
    ("quantizers", 1, 64),
    ("k", 0, 64),
    ("digits", 0, 12),
    ("blocks", 0, 8),
    ("folds", 0, 64),
    *((name, 0, 0) for name in UNKNOWN_TO_SOFTMAX),
)


@dataclass(frozen=True)
class Descriptor:
    """One command. Fields in the order of memory; addresses are in beats of 32 bytes.

    Of a softmax (flags SOFTMAX, perhaps BARRIER, no others) ``left`` are its scores, rows of ``n``, and the fields
    of ``UNKNOWN_TO_SOFTMAX`` are 0. If terms are added to them, ``k`` is the width of the picture of keys, ``right``
    the address of the terms, ``blocks`` and ``folds`` their beats (of rows, of columns), and ``digits`` the fraction
    bits that the scores get; without terms these are 0.

    Attributes:
        version: of this format, 3.
        family: of the left operand: 0 uniform (also per head and grouped), 1 hluq, 2 table.
        flags: 1 both operands come at run time, 2 waits until all earlier results are written, 4 GELU, 8 offsets, 16
            the right operand lies in rows along k, 32 softmax.
        out_format: 0 float32, 1 codes, 2 accumulators of 16 bits.
        left_bits, right_bits: of the codes, 2..8.
        digits: passes over the left operand.
        log_levels: L of hluq, else 0.
        out_bits: of the codes that are written, else 0.
        left_interval, right_interval: cycles from one beat that fills a buffer to the next while the cells compute.
        quantizers: how many the output has.
        groups: of left channels, each with a scale.
        heads: product i is of head i % heads.
        m, k, n: rows, codes of a row, columns of a product.
        batch: products.
        left, right, parameters, out: addresses.
        folds: of a row, all groups together.
        block_rows: rows that the left buffer takes at once, a multiple of the cells.
        blocks: of the rows of a product.
        steps, last_steps: rows of a cell in a block, and in the last one.
    """

    version: int
    family: int
    flags: int
    out_format: int
    left_bits: int
    right_bits: int
    digits: int
    log_levels: int
    out_bits: int
    left_interval: int
    right_interval: int
    quantizers: int
    groups: int
    heads: int
    m: int
    k: int
    n: int
    batch: int
    left: int
    right: int
    parameters: int
    out: int
    folds: int
    block_rows: int
    blocks: int
    steps: int
    last_steps: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, bits = getattr(self, field.name), _bits(field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
                raise SpecError(f"descriptor: `{field.name}` must be an integer of {bits} bits, got {value!r}")
        is_softmax = self.flags & ~BARRIER == SOFTMAX
        for name, least, most in (*_OF_BOTH, *(_OF_SOFTMAX if is_softmax else _OF_MATMUL)):
            if not least <= getattr(self, name) <= most:
                raise SpecError(f"descriptor: `{name}` must lie in [{least}, {most}], got {getattr(self, name)}")
        terms = (self.k, self.blocks, self.folds)
        if is_softmax and (any(terms) != all(terms) or (not self.k and (self.digits or self.right))):
            raise SpecError(f"descriptor: a softmax has `k`, `blocks` and `folds` of terms, or none, got {terms}")

    def encode(self) -> bytes:
        """The 64 bytes."""
        return _FORMAT.pack(*astuple(self))


def decode(data: bytes) -> Descriptor:
    """The descriptor in 64 bytes.

    Raises:
        SpecError: another length or version, a field out of its range, or reserved bytes that are not zero.
    """
    if len(data) != SIZE:
        raise SpecError(f"a descriptor has {SIZE} bytes, got {len(data)}")
    if data[0] != VERSION:
        raise SpecError(
            f"the descriptor has version {data[0]}, this package reads {VERSION}: compile the program again"
        )
    if any(data[58:]):
        raise SpecError(f"the reserved bytes 58 to 63 of a descriptor must be zero, got {data[58:].hex()}")
    return Descriptor(*_FORMAT.unpack(data))


def _bits(name: str) -> int:
    if name in _WORDS:
        return 32
    return 16 if name in ("groups", "heads", *_COUNTS) else 8
