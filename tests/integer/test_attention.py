# SPDX-License-Identifier: Apache-2.0
"""Attention in tiles equals its parts one after another, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

from ahcq_plugin.export.operands import UniformOperand
from ahcq_plugin.integer import use_backend
from ahcq_plugin.integer.attention import IntegerAttention, Positions, RelativePositions
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.products import IntegerProduct
from tests.export.specs import make_left
from tests.integer.cases import BACKENDS, agq_operand, lnq_operand

PROBABILITIES = {
    "uniform": UniformOperand(8, np.float32(1 / 255), 0),
    "lnq4": lnq_operand(4),
    "lnq8": lnq_operand(8),
    "agq4": agq_operand(4, 2),
}


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """That of the backend in use."""
    backend = backend_for(scores)
    return backend.softmax(scores) if backend.name == "native" else torch.softmax(scores, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=40)
@given(
    family=st.sampled_from(sorted(PROBABILITIES)),
    bits=st.integers(2, 8),
    batch=st.integers(0, 3),
    queries=st.integers(1, 14),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    width=st.integers(1, 20),
    channels=st.integers(1, 70),
    factors=st.lists(st.sampled_from(["mul", "div"]), max_size=2),
    positions=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention(backend, family, bits, batch, queries, grid, width, channels, factors, positions, seed) -> None:
    rng = np.random.default_rng(seed)
    q_operand, k_operand, v_operand = (make_left("uniform", bits, 1, rng) for _ in range(3))
    qk, av = IntegerProduct(q_operand, k_operand), IntegerProduct(PROBABILITIES[family], v_operand)
    encoder, keys = Encoder(PROBABILITIES[family]), grid[0] * grid[1]
    attention = IntegerAttention(qk, encoder, av, tuple(factors))
    q, k, v = (
        torch.from_numpy(rng.integers(0, 2**bits, shape)).to(torch.uint8)
        for shape in ((batch, queries, width), (batch, keys, width), (batch, keys, channels))
    )
    scalars = tuple(float(rng.uniform(0.05, 3)) for _ in factors)
    terms = None
    if positions:
        terms = Positions(*(torch.from_numpy(rng.normal(size=(batch, queries, n)).astype(np.float32)) for n in grid))
    with use_backend(backend):
        found = attention(q, k.transpose(1, 2), v, scalars, terms)
        scores = attention.scaled(qk(q, k.transpose(1, 2)), scalars)
        if terms is not None:
            scores = terms.add(scores, slice(None), slice(None))
        wanted = av(encoder(softmax(scores)), v) if batch else torch.empty_like(found)
    assert found.shape == (batch, queries, channels) and torch.equal(found, wanted)


def test_terms_are_those_of_sam_and_other_functions_are_not_replaced() -> None:
    assert RelativePositions.can_replace(add_decomposed_rel_pos)

    def shifted(attn, q, rel_pos_h, rel_pos_w, q_size, k_size):
        return add_decomposed_rel_pos(attn, q, rel_pos_h, rel_pos_w, q_size, k_size) + 1

    get_rel_pos = add_decomposed_rel_pos.__globals__["get_rel_pos"]
    shifted.__globals__.setdefault("get_rel_pos", get_rel_pos)
    assert not RelativePositions.can_replace(shifted)
    assert not RelativePositions.can_replace(torch.add)


def test_positions_that_do_not_fit_are_refused() -> None:
    product = IntegerProduct(UniformOperand(4, np.float32(1), 0), UniformOperand(4, np.float32(1), 0))
    attention = IntegerAttention(product, Encoder(PROBABILITIES["uniform"]), product, ())
    codes = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit 1 products of 4 queries and 4 keys"):
        attention(codes, codes, codes, (), Positions(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3)))
