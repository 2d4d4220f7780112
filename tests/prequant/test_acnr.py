# SPDX-License-Identifier: Apache-2.0
"""ACNR on scalars equals its definition with two SVDs a step, and keeps what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ahcq_plugin.prequant.acnr import condition_weight, raise_tail
from ahcq_plugin.studies.reference.acnr import error_rows, gram_of, ill_weight, randn, reduce_step_by_step


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


# --- against the definition


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((128, 192), 0.3), ((96, 40), 0.0), ((96, 40), 2.0), ((33, 33), 0.3), ((33, 33), 2.0), ((5, 64), 2.0)],
)
def test_equals_the_definition_over_200_steps(shape, scale):
    weight, rows = ill_weight(*shape), error_rows(shape[1], scale)
    expected = reduce_step_by_step(weight, rows)
    ours = condition_weight(weight, gram_of(rows)).weight
    assert relative(ours, expected) < 1e-10
    assert relative(ours, weight) > 1e-3  # there was something to compare


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**20),
    condition=st.sampled_from([1.0, 5.0, 300.0, 1e6]),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    lam=st.sampled_from([0.0, 0.003, 0.3]),
    beta=st.sampled_from([0.0, 0.001, 0.1]),
    energy=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    steps=st.integers(0, 6),
)
def test_equals_the_definition_for_any_shape_and_setting(shape, seed, condition, scale, lam, beta, energy, steps):
    weight = ill_weight(*shape, condition, seed) if condition > 1 else randn(*shape, seed=seed)
    rows = error_rows(shape[1], scale, seed)
    expected = reduce_step_by_step(weight, rows, lam, beta, energy, steps)
    ours = condition_weight(weight, gram_of(rows), lam, beta, energy, threshold=0, steps=steps).weight
    assert relative(ours, expected) < 1e-10


def test_values_that_overtake_one_another_take_their_errors_along():
    """The least value has no error and passes its neighbours, which their errors hold back."""
    values = torch.tensor([10.0, 9.0, 1.2, 1.1, 1.0], dtype=torch.float64)
    weight = torch.diag(values)
    rows = [torch.diag(torch.tensor([0.0, 0.0, 90.0, 60.0, 0.0], dtype=torch.float64))]
    new = condition_weight(weight, gram_of(rows), threshold=0).weight
    diagonal = new.diagonal()
    assert diagonal[4] > diagonal[2] + 0.5 and diagonal[4] > diagonal[3] + 0.5
    assert relative(new, reduce_step_by_step(weight, rows)) < 1e-12


# --- properties


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_condition_number_never_rises_and_no_value_falls(shape, seed, scale, dtype):
    weight = (ill_weight(*shape, 1e5, seed) if seed % 2 else randn(*shape, seed=seed)).to(dtype)
    result = condition_weight(weight, gram_of(error_rows(shape[1], scale, seed)), lam=0.05, threshold=0, steps=30)
    assert result.weight.dtype == dtype and result.weight.shape == weight.shape
    assert result.condition_after <= result.condition_before
    assert bool((result.singular_after >= result.singular_before).all())
    assert result.singular_after[0] == result.singular_before[0]
    # what is reported is what the weight has
    noise = 1e-5 if dtype == torch.float32 else 1e-13
    for report, matrix in ((result.singular_before, weight), (result.singular_after, result.weight)):
        torch.testing.assert_close(torch.linalg.svdvals(matrix.double()), report, rtol=0, atol=noise * float(report[0]))


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=12),
    energy=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_one_step_protects_the_leading_energy(values, energy, seed):
    values = torch.tensor(values, dtype=torch.float64)
    new = raise_tail(values, randn(len(values), seed=seed).square(), 0.3, 0.1, energy, 1)
    total, reached = float((values / values.max().clamp(min=1e-300)).square().sum()), 0.0
    for index in values.argsort(descending=True, stable=True).tolist():
        assert new[index] == values[index]
        reached += float(values[index] / values.max().clamp(min=1e-300)) ** 2
        if reached > energy * total * (1 + 1e-12):
            break


def test_protected_directions_and_singular_vectors_are_kept():
    weight = ill_weight(40, 24)
    result = condition_weight(weight, gram_of(error_rows(24, 1.0)))
    left, before, right = torch.linalg.svd(weight, full_matrices=False)
    inside = left.T @ result.weight @ right.T
    assert float((inside - inside.diag().diag()).abs().max()) < 1e-13 * float(before[0])
    head = int((before.square().cumsum(0) <= 0.8 * before.square().sum()).sum()) + 1
    torch.testing.assert_close(inside.diag()[:head], before[:head], rtol=1e-13, atol=0)
    assert bool((inside.diag()[-10:] > 2 * before[-10:]).all())


SEPARATE = [100.0, 80.0, 5.0, 4.0, 2.0, 1.0, 0.1, 0.01]  # the first two are protected whatever the others do


@pytest.mark.parametrize("steps", [1, 100])
@settings(max_examples=30)
@given(errors=st.lists(st.floats(0, 1e3), min_size=8, max_size=8), which=st.integers(2, 7), more=st.floats(0.1, 1e3))
def test_a_larger_error_means_a_smaller_rise(steps, errors, which, more):
    values, errors = (torch.tensor(numbers, dtype=torch.float64) for numbers in (SEPARATE, errors))
    rise = raise_tail(values, errors, 0.003, 0.001, 0.8, steps)[which] - values[which]
    errors[which] += more
    less = raise_tail(values, errors, 0.003, 0.001, 0.8, steps)[which] - values[which]
    assert less < rise or rise == less == 0


@pytest.mark.parametrize("steps", [1, 200])
def test_the_rise_grows_with_lam_and_falls_with_beta(steps):
    values = torch.tensor(SEPARATE, dtype=torch.float64)
    errors = torch.linspace(0, 20, 8, dtype=torch.float64)

    def reached(lam: float, beta: float) -> Tensor:
        return raise_tail(values, errors, lam, beta, 0.8, steps)

    growth = torch.stack([reached(lam, 0.001) for lam in (0.0, 0.001, 0.002, 0.004, 0.008)]).diff(dim=0)
    assert bool((growth >= 0).all() and (growth[:, 5:] > 0).all())
    growth = torch.stack([reached(0.004, beta) for beta in (0.0, 0.001, 0.002, 0.004)]).diff(dim=0)
    assert bool((growth <= 0).all() and (growth[:, 5:] < 0).all())


def test_the_tail_ends_where_pull_and_error_balance():
    values = torch.tensor(SEPARATE, dtype=torch.float64)
    errors = torch.tensor([0, 0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0], dtype=torch.float64)
    lam, beta = 0.3, 0.4
    end = raise_tail(values, errors, lam, beta, 0.8, 2000)
    balance = end.mean() * lam / (lam + beta * errors)
    torch.testing.assert_close(end[2:], torch.maximum(values, balance)[2:], rtol=1e-9, atol=0)
    assert bool((balance > values)[5:].all())


def test_without_errors_200_steps_go_70_percent_of_the_way():
    """Many protected values, so that the mean stays where it is."""
    values = torch.tensor([1.0] * 9998 + [1e-3, 1e-4], dtype=torch.float64)
    end = raise_tail(values, torch.zeros(10000, dtype=torch.float64), 0.003, 0.001, 0.9999, 200)
    share = (end - values)[-2:] / (values.mean() - values[-2:])
    assert share.tolist() == pytest.approx([1 - 1.006**-200] * 2, rel=1e-3) and 0.69 < float(share[0]) < 0.71


# --- when nothing is to be done


def test_the_given_object_comes_back_where_nothing_changes():
    weight, gram = nn.Parameter(ill_weight(8, 12, condition=90).float()), torch.eye(12)
    assert condition_weight(weight, gram).weight is weight
    assert condition_weight(weight, gram, threshold=0, steps=0).weight is weight
    assert condition_weight(weight, gram, threshold=0, lam=0).weight is weight
    assert condition_weight(weight, gram, threshold=0, energy=1).weight is weight
    before = weight.detach().clone()
    changed = condition_weight(weight, gram, threshold=0)
    assert changed.weight is not weight and not changed.weight.requires_grad
    assert changed.condition_after < changed.condition_before
    assert torch.equal(weight, before)
    assert condition_weight(weight, gram, threshold=89.9).weight is not weight


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_single_singular_value_is_protected(shape):
    weight = randn(*shape)
    result = condition_weight(weight, torch.eye(shape[1]), threshold=0)
    assert result.weight is weight and result.condition_before == 1


def test_a_zero_matrix_stays():
    weight = torch.zeros(4, 3)
    result = condition_weight(weight, torch.eye(3), threshold=0)
    assert result.weight is weight and result.condition_before == result.condition_after == math.inf


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_missing_ranks_are_filled_in(shape):
    weight = randn(shape[0], 2) @ randn(2, shape[1], seed=1)
    result = condition_weight(weight, torch.eye(shape[1]))
    assert result.condition_before == math.inf and result.singular_before[2:].tolist() == [0] * 4
    assert 1 < result.condition_after < 100
    assert float(torch.linalg.cond(result.weight)) == pytest.approx(result.condition_after, rel=1e-9)


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e200])
def test_the_scale_of_the_weight_does_not_matter(factor):
    weight, gram = ill_weight(6, 9), gram_of(error_rows(9, 3.0))
    scaled = condition_weight(weight * factor, gram).weight / factor
    assert relative(scaled, condition_weight(weight, gram).weight) < 1e-12
