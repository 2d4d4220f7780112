# SPDX-License-Identifier: Apache-2.0
"""Float operations as RTL against numpy, bit for bit, at the edges: rounding, subnormals, infinities, NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.simulate import build

NAN, SIGN = np.uint32(0x7FC00000), np.uint32(0x80000000)
COUNT = 60_000
SOURCE = """#include <hls_stream.h>
#include <stdint.h>
struct numbers { float a, b; int64_t c; };
struct results {
    float sum, difference, product, of_64, of_40, of_20, of_unsigned;
    int32_t word; int16_t half; uint8_t byte; int64_t wide;
};
void top(hls::stream<numbers>& in, hls::stream<results>& out) {
    while (true) {
#pragma HLS PIPELINE II = 1
        const numbers x = in.read();
        results y;
        y.sum = x.a + x.b;
        y.difference = x.a - x.b;
        y.product = x.a * x.b;
        y.of_64 = float(x.c);
        y.of_40 = float(int64_t(uint64_t(x.c) << 24) >> 24);
        y.of_20 = float(int32_t(uint32_t(x.c) << 12) >> 12);
        y.of_unsigned = float(uint32_t(x.c));
        y.word = int32_t(x.a);
        y.half = int16_t(x.a);
        y.byte = uint8_t(x.a);
        y.wide = int64_t(x.a);
        out.write(y);
    }
}
"""
RESULTS = np.dtype(
    [(name, np.uint32) for name in ("sum", "difference", "product", "of_64", "of_40", "of_20", "of_unsigned")]
    + [("word", np.int32), ("half", np.int16), ("byte", np.uint8), ("wide", np.int64)],
    align=True,
)


def edges(rng: np.random.Generator) -> np.ndarray:
    """Words of floats: any, with exponents and fractions at the ends of their ranges among them."""
    words = rng.integers(0, 2**32, COUNT, np.uint32)
    powers = rng.choice([0, 1, 2, 126, 127, 128, 150, 151, 152, 253, 254, 255], COUNT).astype(np.uint32)
    fractions = rng.choice([0, 1, 2, 3, 0x7FFFFF, 0x7FFFFE, 0x400000, 0x3FFFFF, 0x400001], COUNT).astype(np.uint32)
    words = np.where(rng.random(COUNT) < 0.5, words & 0x807FFFFF | powers << 23, words)
    return np.where(rng.random(COUNT) < 0.4, words & 0xFF800000 | fractions, words).astype(np.uint32)


def pairs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two floats: near exponents, numbers that nearly cancel, products about the least normal number among them."""
    a, b = edges(rng), edges(rng)
    power = (a >> 23 & 255).astype(int)
    kind = rng.integers(0, 5, COUNT)
    near = np.clip(power + rng.integers(-27, 28, COUNT), 0, 255).astype(np.uint32) << 23
    least = np.clip(128 - power + rng.integers(-2, 3, COUNT), 0, 255).astype(np.uint32) << 23
    b = np.where(kind == 0, b & 0x807FFFFF | near, b)
    b = np.where(kind == 1, b & 0x807FFFFF | least, b)
    b = np.where(kind == 2, a ^ rng.integers(0, 2, COUNT, np.uint32) << 31 ^ rng.integers(0, 4, COUNT, np.uint32), b)
    return a, b.astype(np.uint32)


def flushed(words: np.ndarray) -> np.ndarray:
    """Subnormals are zeros of their sign, and there is one NaN."""
    words = np.where(words & 0x7F800000 == 0, words & SIGN, words)
    return np.where(np.isnan(words.astype(np.uint32).view(np.float32)), NAN, words).astype(np.uint32)


def test_they_are_those_of_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = pairs(rng)
    c = rng.integers(-(2**63), 2**63, COUNT) >> rng.integers(0, 64, COUNT)
    words = np.concatenate([a[:, None], b[:, None], c.view(np.uint32).reshape(COUNT, 2)], 1)
    (tmp_path / "top.cpp").write_text(SOURCE, encoding="utf-8")
    rtl = compile_rtl(Program(tmp_path / "top.cpp", (sources("include"),)), "top", cache=cache_folder())
    run = build(rtl, cache_folder()).run({"in": words}, {"out": COUNT})
    found = np.ascontiguousarray(run.outputs["out"]).view(RESULTS)[:, 0]
    x, y = (flushed(side).view(np.float32) for side in (a, b))
    narrow = {bits: (c << (64 - bits)) >> (64 - bits) for bits in (64, 40, 20)}
    with np.errstate(all="ignore"):
        wanted = dict(sum=x + y, difference=x - y, product=x * y)
        wanted |= {f"of_{bits}": value.astype(np.float32) for bits, value in narrow.items()}
        wanted["of_unsigned"] = (c & 0xFFFFFFFF).astype(np.float32)
        exact = x.astype(np.float64)
    for name, floats in wanted.items():
        wrong = np.flatnonzero(found[name] != flushed(floats.view(np.uint32)))
        assert not len(wrong), (name, [(hex(a[i]), hex(b[i]), c[i], hex(found[name][i])) for i in wrong[:3]])
    for name in ("word", "half", "byte", "wide"):
        limits = np.iinfo(RESULTS[name])
        whole = np.trunc(np.nan_to_num(exact, nan=np.inf, posinf=np.inf, neginf=-np.inf))
        fits = (whole >= limits.min) & (whole < limits.max + 1.0) & (exact > -1 if limits.min == 0 else True)
        assert fits.sum() > COUNT // 10
        assert (found[name][fits] == whole[fits].astype(RESULTS[name])).all(), name
