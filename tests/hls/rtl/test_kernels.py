# SPDX-License-Identifier: Apache-2.0
"""The kernels of hls/include as RTL: rows in, accumulators or floats out, equal to the golden model bit for bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from ahcq_plugin.hls import HLSOptions, Layer, generate
from ahcq_plugin.hls.rtl import cache_folder
from ahcq_plugin.hls.rtl.layers import compile_layers, differences
from ahcq_plugin.hls.rtl.simulate import Simulation, Stalls, build
from ahcq_plugin.hls.vectors import Vectors, make_vectors

_SPEC = importlib.util.spec_from_file_location("hls_cases", Path(__file__).parents[1] / "cases.py")
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)

OPTIONS = HLSOptions(pe=4, simd=4, out=1)
STALLS = (Stalls(), Stalls(idle=0.5), Stalls(back=0.5, seed=2), Stalls(0.3, 0.3, 90, 3))
FAMILIES = ("uniform", "grouped", "hluq", "table")


def built(layers: dict[str, Layer], folder: Path) -> Simulation:
    generate(list(layers.values()), folder)
    rtl = compile_layers(layers, folder, cache=cache_folder())
    # What is called RTL holds no C++ of the kernels.
    assert not any(re.search(r"\bimport\b|DPI", text) for text in rtl.files.values())
    return build(rtl, cache_folder())


def vectors(layers: dict[str, Layer], rows: int) -> dict[str, Vectors]:
    return {name: make_vectors(layer.matmul, 1, rows, seed=5) for name, layer in layers.items()}


def test_rows_through_all_kernels_are_equal(tmp_path) -> None:
    """One layer has a tile that is nearly empty: clang makes constant arrays that end in zeros structures."""
    layers = {name: dataclasses.replace(cases.make_layer(name), options=OPTIONS) for name in FAMILIES}
    padded = cases.make_layer("padded", ("linear", "uniform", 8, 8, 21, 17))
    layers["padded"] = dataclasses.replace(padded, options=HLSOptions(pe=16, simd=4, out=1))
    simulation = built(layers, tmp_path / "layers")
    for stalls in STALLS:
        assert differences(simulation, layers, vectors(layers, 12), stalls) == dict.fromkeys(layers, 0), stalls


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_100_000_dot_products_a_family_are_equal(tmp_path, bits: int) -> None:
    shapes = {name: ("linear", name, bits, bits, 21, 15) for name in FAMILIES}
    layers = {
        name: dataclasses.replace(cases.make_layer(name, shape), options=HLSOptions(pe=8, simd=4, out=4))
        for name, shape in shapes.items()
    }
    simulation = built(layers, tmp_path / "layers")
    for stalls in STALLS:
        assert differences(simulation, layers, vectors(layers, -(-100_000 // 15)), stalls) == dict.fromkeys(
            FAMILIES, 0
        ), stalls
