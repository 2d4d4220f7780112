# SPDX-License-Identifier: Apache-2.0
"""The isotropic baseline: every singular value moves towards the mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ahcq_plugin.prequant.condiquant import condition_weight_isotropic


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_by_step(weight: Tensor, lam: float, steps: int) -> Tensor:
    """The definition, with an SVD in every step."""
    for _ in range(steps):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left @ torch.diag((values + 2 * lam * values.mean()) / (1 + 2 * lam)) @ right
    return weight


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
    lam=st.sampled_from([0.0, 0.003, 0.3]),
    steps=st.integers(0, 8),
)
def test_equals_the_definition(shape, seed, lam, steps):
    weight = randn(*shape, seed=seed)
    ours = condition_weight_isotropic(weight, lam, threshold=0, steps=steps).weight
    torch.testing.assert_close(ours, step_by_step(weight, lam, steps), rtol=1e-10, atol=1e-12)


def test_equals_the_definition_over_200_steps():
    weight = randn(40, 64) * torch.logspace(0, -4, 64, dtype=torch.float64)
    ours = condition_weight_isotropic(weight).weight
    expected = step_by_step(weight, 0.003, 200)
    assert float((ours - expected).norm() / expected.norm()) < 1e-12
    assert float((ours - weight).norm() / weight.norm()) > 0.3


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_head_and_tail_meet_at_an_unmoved_mean(shape, seed, dtype):
    weight = randn(*shape, seed=seed).to(dtype)
    result = condition_weight_isotropic(weight, threshold=0)
    before, after = result.singular_before, result.singular_after
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=1e-12)
    torch.testing.assert_close(after - after.mean(), (before - before.mean()) * 1.006**-200, rtol=1e-9, atol=1e-12)
    assert result.condition_after < result.condition_before
    assert result.weight.dtype == dtype
    noise = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(torch.linalg.svdvals(result.weight.double()), after, rtol=0, atol=noise)


def test_singular_vectors_are_kept():
    weight = randn(20, 30)
    left, before, right = torch.linalg.svd(weight, full_matrices=False)
    inside = left.T @ condition_weight_isotropic(weight, threshold=0).weight @ right.T
    assert float((inside - inside.diag().diag()).abs().max()) < 1e-13 * float(before[0])


def test_the_given_object_comes_back_where_nothing_changes():
    weight = nn.Parameter(torch.diag(torch.tensor([99.0, 3.0, 1.0])))
    assert condition_weight_isotropic(weight).weight is weight
    assert condition_weight_isotropic(weight, threshold=0, steps=0).weight is weight
    assert condition_weight_isotropic(weight, threshold=0, lam=0).weight is weight
    assert condition_weight_isotropic(weight, threshold=98).weight is not weight
    zero = torch.zeros(2, 3)
    assert condition_weight_isotropic(zero, threshold=0).weight is zero


def test_extremes():
    low_rank = randn(6, 2) @ randn(2, 9, seed=1)
    result = condition_weight_isotropic(low_rank)
    assert result.condition_before == math.inf and result.condition_after < 10
    # with many strong steps all values are the mean, whatever the power is in floating point
    result = condition_weight_isotropic(randn(5, 5), lam=1e6, threshold=0, steps=10**6)
    assert result.condition_after == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("name", "value"), [("lam", -1), ("threshold", math.nan), ("steps", 1.5), ("steps", True)])
def test_a_bad_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* got {value!r}"):
        condition_weight_isotropic(torch.eye(2), **{name: value})


def test_a_bad_weight_is_named():
    with pytest.raises(ValueError, match="`weight` must be finite, got 1 of 4"):
        condition_weight_isotropic(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
