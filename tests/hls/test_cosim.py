# SPDX-License-Identifier: Apache-2.0
"""Generated tops behind their AXI ports, driven by cocotb: equal to the golden model whatever stalls and resets do.

The tests inside the simulation are in ``hls/cocotb/ahcq_bench.py``.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ahcq_plugin.hls import HLSOptions, Layer, cosim, generate
from ahcq_plugin.hls.vectors import make_vectors

OPTIONS = HLSOptions(pe=8, simd=8, out=4)
# 21 = 2 folds and a tail of 5 inputs; 15 outputs = 2 tiles of 8 with a tail of 7, and 4 beats with a tail of 3
SHAPES = {
    "uniform": ("linear", "uniform", 4, 4, 21, 15),
    "grouped": ("linear", "grouped", 4, 4, 21, 15),
    "hluq": ("linear", "hluq", 4, 4, 21, 15),
    "table": ("linear", "table", 4, 4, 21, 15),
    "qk": ("qk", "uniform", 4, 4, 21, 15),
    "av_table": ("av", "table", 4, 3, 21, 15),
}
VECTORS = 100_000  # dot products: pairs of a row and a column
ALL = {
    *(f"matches_golden/idle={idle}/backpressure={back}" for idle in (False, True) for back in (False, True)),
    "a_reset_in_mid_packet_leaves_nothing",
    "many_vectors",
}


def make_layer(cases, name: str) -> Layer:
    return dataclasses.replace(cases.make_layer(name, SHAPES[name]), options=OPTIONS)


def launches(layer: Layer):
    """Small launches with any number of rows and products, down to one."""
    return [make_vectors(layer.matmul, batch, rows, seed=rows) for batch, rows in ((1, 6), (2, 1), (3, 4))]


@pytest.mark.parametrize("name", SHAPES)
def test_the_top_behind_its_ports_is_equal(cases, tmp_path, name: str) -> None:
    layer = make_layer(cases, name)
    batch = 1 if layer.matmul.kind == "linear" else 67
    large = [make_vectors(layer.matmul, batch, -(-VECTORS // (layer.matmul.n * batch)), seed=9)]
    folder = generate([layer], tmp_path / "layers")
    result = cosim.simulate(layer, folder, launches(layer), large)
    assert result.failed == {}
    assert set(result.passed) == ALL
    assert large[0].left.shape[0] * large[0].left.shape[1] * layer.matmul.n >= VECTORS


def test_the_registers_lie_where_vitis_puts_them(cases, tmp_path) -> None:
    layer = cases.make_layer("av_table")
    folder = generate([layer], tmp_path / "layers")
    addresses = json.loads((folder / layer.top / "registers.json").read_text(encoding="utf-8"))
    assert addresses == {"control": 0, "batch": 0x10, "rows": 0x18, "scales": 0x20, "address_bits": 6}
    wide = dataclasses.replace(cases.make_layer("uniform"), unit="u")
    folder = generate([wide], tmp_path / "wide")
    addresses = json.loads((folder / wide.top / "registers.json").read_text(encoding="utf-8"))
    assert addresses == {"control": 0, "rows": 0x10, "scales": 0x80, "address_bits": 8}  # 21 words: a memory of 32


@pytest.mark.parametrize(("bits", "simd", "length"), [(4, 8, 21), (3, 4, 5), (8, 2, 3), (5, 3, 3)])
def test_packing_puts_code_i_at_bit_i_times_bits(bits: int, simd: int, length: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, length))
    beat_bytes = -(-simd * bits // 8)
    beats = cosim.pack_codes(codes, bits, simd).reshape(6, -(-length // simd), beat_bytes)
    for row, line in zip(codes.reshape(6, length), beats, strict=True):
        for place, code in enumerate(row):
            word = int.from_bytes(line[place // simd].tobytes(), "little")
            assert word >> (place % simd * bits) & (2**bits - 1) == code
        unused = int.from_bytes(line[-1].tobytes(), "little") >> ((length - 1) % simd + 1) * bits
        assert unused == 2 ** (8 * beat_bytes - ((length - 1) % simd + 1) * bits) - 1


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("hluq", "operands.h", "if (!is_zero) acc[1]", "acc[1]"),
        ("qk", "attention.h", "acc_t(product[pe][0] - by_right)", "acc_t(product[pe][0] + by_right)"),
    ],
)
def test_a_wrong_kernel_is_seen_through_the_ports(
    cases, tmp_path, name: str, file: str, right: str, wrong: str
) -> None:
    layer = make_layer(cases, name)
    folder = generate([layer], tmp_path / "layers")
    path = folder / "include" / "ahcq" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    result = cosim.simulate(layer, folder, launches(layer))
    assert set(result.failed) == ALL - {"many_vectors"}
    assert all("value mismatch" in message for message in result.failed.values()), result.failed
