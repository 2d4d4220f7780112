# SPDX-License-Identifier: Apache-2.0
"""Whatever a valid spec holds, the code generated from it compiles and gives the golden model's numbers."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ahcq_plugin.export.codes import encode
from ahcq_plugin.hls import HLSOptions, Layer, compile_generated, generate
from ahcq_plugin.hls.vectors import make_vectors, quantizer_values

KINDS = (
    ("linear", "uniform"),
    ("linear", "grouped"),
    ("linear", "hluq"),
    ("linear", "table"),
    ("qk", "uniform"),
    ("av", "uniform"),
    ("av", "table"),
    ("qk", "per_head"),
    ("av", "table", "per_head"),
)
# K and N from 1 up to several folds and tiles; random zero points, groups, L, tables, boundaries, scales by the seed
ONE = st.fixed_dictionaries(
    dict(
        kind=st.sampled_from(KINDS),
        bits=st.integers(2, 8),
        right_bits=st.integers(2, 8),
        k=st.integers(1, 40),
        n=st.integers(1, 20),
        simd=st.sampled_from([1, 2, 3, 4, 8]),
        out=st.sampled_from([1, 2, 3]),
        pe_beats=st.integers(1, 4),
        seed=st.integers(0, 2**32 - 1),
    )
)


# Compilation dominates: six specs are compiled together, and a failure is shown as it is, not shrunk.
@settings(
    max_examples=5,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(ONE, min_size=6, max_size=6))
def test_any_spec_compiles_and_is_equal(cases, drawn: list[dict]) -> None:
    layers = {}
    for index, case in enumerate(drawn):
        rng = np.random.default_rng(case["seed"])
        kind, family, *right = case["kind"]
        matmul = cases.make_matmul(kind, family, case["bits"], case["right_bits"], case["k"], case["n"], rng, *right)
        options = HLSOptions(pe=case["out"] * case["pe_beats"], simd=case["simd"], out=case["out"])
        layer = Layer("unit", dataclasses.replace(matmul, name=f"layer.{index}"), options)
        layers[layer.top] = layer
    with tempfile.TemporaryDirectory() as place:
        folder = generate(list(layers.values()), Path(place) / "layers")
        compiled = compile_generated(list(layers.values()), folder)
        for case, (top, layer) in zip(drawn, layers.items(), strict=True):
            vectors = make_vectors(layer.matmul, 3, 60, case["seed"])
            result = compiled[top].run(vectors.left, vectors.right)
            wrong = cases.differences(layer, vectors, result.accumulators, result.output)
            assert wrong == (0, 0), f"{wrong} accumulators and floats differ in {case}"
            values = quantizer_values(layer.matmul.left, 240, layer.matmul.k, case["seed"])
            if layer.inputs[0].is_per_head:
                values = values.reshape(-1, 2, layer.matmul.k)
            codes = compiled[top].quantize("left_quantizer", values)
            assert (codes == encode(layer.matmul.left, values)).all(), f"codes differ in {case}"
