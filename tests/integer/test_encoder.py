# SPDX-License-Identifier: Apache-2.0
"""Encoders give the codes of the exported operands, bit for bit; the kernels' softmax is as exact as float32 allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ahcq_plugin.export.codes import decode, encode
from ahcq_plugin.integer import use_backend
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.encoder import Encoder
from tests.export.specs import LEFT_FAMILIES, make_left
from tests.integer.cases import BACKENDS


def values(rng: np.random.Generator, operand, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers around the boundaries of an operand: random, exactly on them, beside them, ties of rounding, huge."""
    x = rng.normal(size=shape).astype(np.float32)
    if operand.family in ("hluq", "table"):
        on = rng.choice(operand.boundaries, shape)
        x = np.where(rng.random(shape) < 0.5, on, np.nextafter(on, rng.choice([-np.inf, np.inf], shape)))
    elif operand.family == "uniform":
        ties = ((rng.integers(-300, 300, shape) + 0.5) * operand.scale).astype(np.float32)
        x = np.where(rng.random(shape) < 0.7, ties, x)
    extremes = np.array([3e38, -3e38, np.inf, -np.inf, 0.0, -0.0], np.float32)
    return np.where(rng.random(shape) < 0.05, rng.choice(extremes, shape), x).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=80)
@given(
    family=st.sampled_from(LEFT_FAMILIES),
    bits=st.integers(2, 8),
    batch=st.integers(0, 2),
    rows=st.integers(0, 70),
    channels=st.integers(1, 90),
    layout=st.sampled_from(["rows", "columns", "slice"]),
    for_rows=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes(backend, family, bits, batch, rows, channels, layout, for_rows, seed) -> None:
    rng = np.random.default_rng(seed)
    operand = make_left(family, bits, channels, rng)
    x = values(rng, operand, (batch, rows, channels))
    tensor = torch.from_numpy(x)
    if layout == "columns":
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        tensor = torch.cat([tensor, tensor], -1)[..., :channels]
    coder = Encoder(operand)
    coder.rows = for_rows
    with use_backend(backend):
        codes = coder(tensor)
    assert codes.dtype == torch.uint8 and (codes.is_contiguous() or not for_rows)
    np.testing.assert_array_equal(codes.numpy(), encode(operand, x))


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=40)
@given(
    family=st.sampled_from(LEFT_FAMILIES),
    shape=st.tuples(st.integers(0, 2), st.integers(0, 70), st.integers(1, 70)),
    layouts=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_codes_of_a_sum(backend, family, shape, layouts, seed) -> None:
    """Of two tensors in any layouts, each row by row or column by column."""
    rng = np.random.default_rng(seed)
    operand = make_left(family, 5, shape[-1], rng)
    parts = [rng.normal(size=shape).astype(np.float32) for _ in layouts]
    tensors = [
        torch.from_numpy(part) if in_rows else torch.from_numpy(part).transpose(1, 2).contiguous().transpose(1, 2)
        for part, in_rows in zip(parts, layouts, strict=True)
    ]
    coder = Encoder(operand)
    coder.rows = True
    with use_backend(backend):
        codes = coder(*tensors)
    assert codes.is_contiguous()
    np.testing.assert_array_equal(codes.numpy(), encode(operand, parts[0] + parts[1]))


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31), family=st.sampled_from(["uniform", "grouped"]))
def test_values_of_uniform_codes(bits, seed, family) -> None:
    rng = np.random.default_rng(seed)
    operand = make_left(family, bits, 9, rng)
    codes = rng.integers(0, 2**bits, (4, 9))
    found = Encoder(operand).decode(torch.from_numpy(codes).to(torch.uint8))
    np.testing.assert_array_equal(found.numpy(), decode(operand, codes))


@pytest.mark.skipif("native" not in BACKENDS, reason="no C++ compiler on PATH")
@pytest.mark.parametrize("columns", [1, 7, 16, 196, 4096])
@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])
def test_softmax_of_the_kernels(columns, spread) -> None:
    """float32 rounds the difference d to the largest score, which moves exp(d) by a share of |d| units; all else takes
    a few units more."""
    scores = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)) * spread
    with use_backend("native"):
        found = backend_for(scores).softmax(scores).double()
    exact = torch.softmax(scores.double(), -1)
    normal = exact > 1e-37
    limit = ((scores - scores.amax(-1, keepdim=True)).abs().double() + 16) * 2.0**-24
    assert bool(((found - exact).abs() <= limit * exact)[normal].all())
    assert float(found[~normal].max() if bool((~normal).any()) else 0) <= 1e-36
