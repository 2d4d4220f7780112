# SPDX-License-Identifier: Apache-2.0
"""Codes of b bits packed into bytes without gaps, the lowest bit first."""

from __future__ import annotations

import numpy as np

MAX_BITS = 8


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of any shape in C order.

    Code i takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, its lowest bit first; bit j of the
    stream is bit ``j % 8`` of byte ``j // 8``. The last byte is filled up with zeros.

    Args:
        codes: in [0, 2^bits - 1].
        bits: 1..8.
    Returns:
        uint8 (packed_size(codes.size, bits),).
    Raises:
        ValueError: a code that does not fit.
    """
    if codes.size and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"`codes` must lie in [0, {2**bits - 1}], got [{codes.min()}, {codes.max()}]")
    planes = np.unpackbits(np.ascontiguousarray(codes, np.uint8).reshape(-1, 1), 1, bits, "little")
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 codes of the given shape from what ``pack`` made.

    Raises:
        ValueError: ``data`` is not uint8 of just the right length, or its filling is not zero.
    """
    count = int(np.prod(shape, dtype=np.int64))
    length = packed_size(count, bits)
    if data.dtype != np.uint8 or data.shape != (length,):
        raise ValueError(
            f"{count} codes of {bits} bits take {length} bytes of dtype uint8, got {data.dtype} {data.shape}"
        )
    planes = np.unpackbits(data, bitorder="little")
    if planes[count * bits :].any():
        raise ValueError("the bits behind the last packed code must be zero")
    return np.packbits(planes[: count * bits].reshape(count, bits), 1, "little").reshape(shape)
