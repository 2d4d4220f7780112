# SPDX-License-Identifier: Apache-2.0
"""GELU, softmax and the rounding of the quantizers: C++ against float64 and against torch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from ahcq_plugin.functional import uniform
from ahcq_plugin.hls.csim import FLAGS, QUIET, compile_cpp, include_flags
from ahcq_plugin.hls.function_tables import render_function_tables
from ahcq_plugin.hls.resources import sources

SOURCE = """
#include "ahcq/gelu.h"
#include "ahcq/quantize.h"
#include "ahcq/softmax.h"
extern "C" {
void gelu(const float* x, float* y, int count) {
    for (int i = 0; i < count; ++i) y[i] = ahcq::gelu(x[i]);
}
int gelu_stream(const float* x, float* y, int count) {
    hls::stream<ap_axiu<96, 0, 0, 0> > in("in"), out("out");
    for (int i = 0; i < count; i += 3) {
        float beat[3];
        for (int j = 0; j < 3; ++j) beat[j] = i + j < count ? x[i + j] : -1.0f;
        in.write(ahcq::float_beat<3>(beat, i + 3 >= count));
    }
    ahcq::gelu_stream<3>(in, count, out);
    for (int i = 0; i < count; i += 3) {
        const ap_axiu<96, 0, 0, 0> beat = out.read();
        if (beat.last != (i + 3 >= count)) return 0;
        for (int j = 0; j < 3 && i + j < count; ++j) {
            y[i + j] = ahcq::bits_float(ap_uint<32>(beat.data.range(32 * j + 31, 32 * j)).to_uint());
        }
    }
    return in.empty() && out.empty();
}
void softmax(const float* x, float* y, int rows) {
    for (int i = 0; i < rows; ++i) {
        ahcq::softmax_row<197, 8>(*(const float(*)[197])(x + 197 * i), *(float(*)[197])(y + 197 * i));
    }
}
void uniform(const float* x, int* y, int count, float scale, int zero_point) {
    for (int i = 0; i < count; ++i) y[i] = ahcq::quantize_uniform<4>(x[i], scale, zero_point);
}
void rounded(const float* x, int* y, int count) {
    for (int i = 0; i < count; ++i) y[i] = ahcq::round_half_even(x[i]);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "functions.cpp").write_text(SOURCE, encoding="utf-8")
    flags = [*FLAGS, *QUIET, *include_flags(sources("include"), folder)]
    compile_cpp([*flags, "-fPIC", "-shared", "functions.cpp", "-o", "functions.so"], folder)
    return ctypes.CDLL(str(folder / "functions.so"))


def call(function, x: np.ndarray, *more, dtype: type = np.float32, size: int | None = None) -> np.ndarray:
    y = np.zeros(x.shape, dtype)
    function(x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), size or x.size, *more)
    return y


def test_gelu_is_within_its_bound(library) -> None:
    rng = np.random.default_rng(0)
    edges = (np.arange(-200, 200) / 32).astype(np.float32)
    near = [np.nextafter(edges, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([np.linspace(-9, 9, 300_001), rng.normal(size=100_000), edges, *near]).astype(np.float32)
    exact = x.astype(np.float64) * ndtr(x.astype(np.float64))
    assert np.abs(call(library.gelu, x) - exact).max() < 5e-7
    torch_y = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    assert np.abs(call(library.gelu, x) - torch_y).max() < 2e-6  # torch itself is off by 1e-6


def test_gelu_far_out(library) -> None:
    x = np.asarray([6.0, 7.5, 1e4, 3e38, -6.0, -1e4, -3e38, 0.0], np.float32)
    np.testing.assert_array_equal(call(library.gelu, x), np.maximum(x, 0))
    assert np.isnan(call(library.gelu, np.asarray([np.nan], np.float32))).all()


@pytest.mark.parametrize("count", [1, 3, 7, 64])
def test_gelu_of_a_stream_is_the_function(library, count: int) -> None:
    x = np.random.default_rng(count).normal(size=count).astype(np.float32)
    y = np.zeros_like(x)
    assert library.gelu_stream(x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), count)
    np.testing.assert_array_equal(y, call(library.gelu, x))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0, 40.0])
def test_softmax_is_within_its_bound(library, spread: float) -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(500, 197)) * spread + rng.normal(size=(500, 1)) * 10).astype(np.float32)
    x[0, 5] = -np.inf  # a masked position
    y = call(library.softmax, x, size=len(x)).astype(np.float64)
    d = x.astype(np.float64) - x.max(1, keepdims=True)
    exact = np.exp(d) / np.exp(d).sum(1, keepdims=True)
    seen = exact > 1e-36
    bound = 1e-6 * (1 + np.abs(d[seen])) * exact[seen]
    assert (np.abs(y - exact)[seen] <= bound).all()
    assert (y[~seen] < 1e-35).all() and np.abs(y - exact).max() < 1e-6
    assert np.abs(y.sum(1) - 1).max() < 1e-6


def test_round_goes_half_to_even(library) -> None:
    halves = np.arange(-600, 601) / 2
    x = np.concatenate([halves, np.nextafter(halves, 1e9), np.nextafter(halves, -1e9)]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(1e9)), np.nextafter(x, np.float32(-1e9))])
    np.testing.assert_array_equal(call(library.rounded, x, dtype=np.int32), np.rint(x))


@pytest.mark.parametrize("zero_point", [0, 7, 15])
def test_uniform_codes_are_those_of_torch(library, zero_point: int) -> None:
    scale = np.float32(0.0371)
    ties = (np.arange(-20, 21) + 0.5) * scale
    x = np.concatenate([ties, np.linspace(-1.5, 1.5, 50_001), [3e38, -3e38, np.inf, -np.inf]]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(-9))])
    codes = call(library.uniform, x, ctypes.c_float(scale), zero_point, dtype=np.int32)
    params = uniform.UniformParams(torch.tensor(scale), torch.tensor(zero_point))
    np.testing.assert_array_equal(codes, uniform.encode(torch.from_numpy(x), params, 4).numpy())


def test_the_committed_tables_are_those_of_the_formulas() -> None:
    committed = Path(sources("include", "ahcq", "function_tables.h")).read_text(encoding="utf-8")
    assert committed == render_function_tables()
