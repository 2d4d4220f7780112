# SPDX-License-Identifier: Apache-2.0
"""Packed codes of weights in specs: ``support.packing`` for 2 to 8 bits, with the errors of a spec."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export.operands import SpecError, check_bits
from ahcq_plugin.support import packing


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (ceil(codes.size * bits / 8),), as ``support.packing.pack`` packs them.

    Raises:
        SpecError: bits outside 2..8, or a code that does not fit in them.
    """
    check_bits(bits)
    try:
        return packing.pack(codes, bits)
    except ValueError as error:
        raise SpecError(str(error)) from None


def unpack(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """int64 codes of the given shape from what ``pack`` made.

    Raises:
        SpecError: ``data`` is not uint8 of just the right length, or its filling is not zero.
    """
    check_bits(bits)
    try:
        return packing.unpack(data, bits, shape).astype(np.int64)
    except ValueError as error:
        raise SpecError(str(error)) from None
