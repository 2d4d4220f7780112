# SPDX-License-Identifier: Apache-2.0
"""The engine in C++ simulation: every accumulator, float and code equal to the golden model, whatever the matmul."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import UniformOperand, golden
from ahcq_plugin.export.matmul import accumulator_range, signed_bits
from ahcq_plugin.export.operands import top
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.config import WIDE, EngineConfig
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.vectors import Vectors, make_vectors

KINDS = (
    ("linear", "uniform"),
    ("linear", "grouped"),
    ("linear", "hluq"),
    ("linear", "table"),
    ("qk", "uniform"),
    ("qk", "per_head"),
    ("av", "uniform"),
    ("av", "table"),
    ("av", "table", "per_head"),
)
# Small buffers: several blocks and tiles with small shapes.
SMALL = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48)
SMALL_INT8 = EngineConfig(cells=2, digit=8, left_depth=24, right_depth=48, plane=8)
COMPACT = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48, shift_lanes=False)
CASES = st.fixed_dictionaries(
    dict(
        bits=st.integers(2, 8),
        right_bits=st.integers(2, 8),
        k=st.integers(1, 150),
        n=st.integers(1, 140),
        rows=st.integers(1, 40),
        batch=st.integers(1, 4),
        zeros=st.sampled_from(["random", "least", "most"]),
        seed=st.integers(0, 2**32 - 1),
    )
)


def with_zeros(operand, zeros: str):
    """The operand with all its zero points at an end of the codes."""
    if zeros == "random" or not hasattr(operand, "zero_point") and not hasattr(operand, "zero_points"):
        return operand
    value = 0 if zeros == "least" else top(operand.bits)
    if isinstance(operand, UniformOperand):
        return dataclasses.replace(operand, zero_point=value)
    return dataclasses.replace(operand, zero_points=np.full_like(operand.zero_points, value))


def make_matmul(cases, which: tuple[str, ...], case: dict):
    kind, family, *right = which
    rng = np.random.default_rng(case["seed"])
    matmul = cases.make_matmul(kind, family, case["bits"], case["right_bits"], case["k"], case["n"], rng, *right)
    left, other = with_zeros(matmul.left, case["zeros"]), with_zeros(matmul.right, case["zeros"])
    width = signed_bits(*accumulator_range(left, other, matmul.k))
    return dataclasses.replace(matmul, left=left, right=other, accumulator_bits=width)


def check(launch, matmul, vectors: Vectors, config: EngineConfig) -> None:
    image = Image()
    command = launch(matmul, vectors, config, image)
    run = simulate.run(image, [command.descriptor], config, accumulators=True)
    wanted = golden.run(matmul, vectors.left, vectors.right)
    sums = simulate.in_order(run.accumulators, command.descriptor, config)
    assert (sums == wanted.accumulators).all(), "accumulators differ"
    assert (command.read_output(image).view(np.uint32) == wanted.output.view(np.uint32)).all(), "floats differ"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="nibbles"),
        pytest.param(WIDE, id="wide"),
        pytest.param(COMPACT, id="compact"),
        pytest.param(SMALL_INT8, id="int8", marks=pytest.mark.slow),
    ],
)
def test_any_matmul_is_equal(cases, launch, config: EngineConfig) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
    @given(kind=st.sampled_from(KINDS), case=CASES)
    @example(KINDS[1], dict(bits=8, right_bits=8, k=150, n=129, rows=40, batch=1, zeros="most", seed=1))
    @example(KINDS[2], dict(bits=8, right_bits=8, k=150, n=129, rows=40, batch=1, zeros="most", seed=4))
    @example(KINDS[4], dict(bits=4, right_bits=4, k=64, n=140, rows=33, batch=4, zeros="most", seed=2))
    @example(KINDS[7], dict(bits=4, right_bits=4, k=149, n=64, rows=40, batch=3, zeros="least", seed=3))
    def property_holds(kind: tuple[str, ...], case: dict) -> None:
        matmul = make_matmul(cases, kind, case)
        check(launch, matmul, make_vectors(matmul, case["batch"], case["rows"], case["seed"]), config)

    property_holds()
