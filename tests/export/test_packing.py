# SPDX-License-Identifier: Apache-2.0
"""Packed codes: round trips, the layout bit by bit, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.export import SpecError
from ahcq_plugin.export.packing import pack, unpack


@given(st.integers(2, 8), st.lists(st.integers(0, 255), max_size=70))
def test_round_trip_and_layout(bits, values):
    codes = np.array([value % 2**bits for value in values], np.int64)
    data = pack(codes, bits)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert data.tobytes() == stream.to_bytes(-(-len(codes) * bits // 8), "little")
    assert np.array_equal(unpack(data, bits, codes.shape), codes)


def test_shapes_are_in_c_order():
    codes = np.arange(15).reshape(3, 5)
    assert np.array_equal(pack(codes.T, 4), pack(np.ascontiguousarray(codes.T), 4))
    assert np.array_equal(unpack(pack(codes, 4), 4, (3, 5)), codes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pack(np.array([16]), 4), r"`codes` must lie in \[0, 15\], got \[16, 16\]"),
        (lambda: pack(np.array([1]), 9), r"`bits` must be an integer in \[2, 8\], got 9"),
        (lambda: unpack(np.zeros(2, np.uint8), 4, (5,)), r"5 codes of 4 bits take 3 bytes .* got uint8 \(2,\)"),
        (lambda: unpack(np.array([0, 16], np.uint8), 4, (3,)), "bits behind the last packed code must be zero"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SpecError, match=message):
        call()
