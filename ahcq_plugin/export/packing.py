# SPDX-License-Identifier: Apache-2.0
"""Codes of b bits packed into bytes without gaps, the lowest bit first."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export.operands import SpecError, check_bits, check_range, top


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of any shape in C order.

    Code i takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, its lowest bit first; bit j of the
    stream is bit ``j % 8`` of byte ``j // 8``. The last byte is filled up with zeros.

    Returns:
        uint8 (ceil(codes.size * bits / 8),).
    Raises:
        SpecError: bits outside 2..8, or a code that does not fit in them.
    """
    check_bits(bits)
    check_range("codes", codes, 0, top(bits))
    planes = np.ascontiguousarray(codes).reshape(-1, 1) >> np.arange(bits) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little")


def unpack(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """int64 codes of the given shape from what ``pack`` made.

    Raises:
        SpecError: ``data`` is not uint8 of just the right length, or its filling is not zero.
    """
    check_bits(bits)
    count = int(np.prod(shape, dtype=np.int64))
    length = -(-count * bits // 8)
    if data.dtype != np.uint8 or data.shape != (length,):
        raise SpecError(
            f"{count} codes of {bits} bits take {length} bytes of dtype uint8, got {data.dtype} {data.shape}"
        )
    planes = np.unpackbits(data, bitorder="little")
    if planes[count * bits :].any():
        raise SpecError("the bits behind the last packed code must be zero")
    return (planes[: count * bits].reshape(count, bits).astype(np.int64) << np.arange(bits)).sum(1).reshape(shape)
