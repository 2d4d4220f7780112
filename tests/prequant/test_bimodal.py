# SPDX-License-Identifier: Apache-2.0
"""Bimodal keys are recognised as scipy's density on all values would, and folding their signs changes no bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import find_peaks
from scipy.stats import gaussian_kde
from torch import Tensor
from torch.nn.functional import linear

from ahcq_plugin.prequant.bimodal import density, fold, is_bimodal, key_signs


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(means: list[float], tokens: int = 500, spread: float = 1.0, channels: int = 128, seed: int = 0) -> Tensor:
    """(tokens, channels): the channels take turns at the means."""
    centres = torch.tensor(means).repeat(channels)[:channels]
    return centres + spread * randn(tokens, channels, seed=seed)


def definition(values: Tensor) -> tuple[bool, np.ndarray]:
    """The verdict and the density of scipy on all values."""
    x = values.double().flatten().numpy()
    y = gaussian_kde(x)(np.linspace(x.min(), x.max(), 128))
    return len(find_peaks(y, height=0.01 * y.sum(), distance=32)[0]) == 2, y


CASES = {
    "two modes": (mixture([-8, 8]), True),
    "two modes off zero": (mixture([20, 33]), True),
    "unequal modes": (mixture([-8, -8, 8]), True),
    "one mode": (mixture([0]), False),
    "one wide mode": (mixture([-0.5, 0.5]), False),
    "three modes": (mixture([-9, 0, 9]), False),
    "a minority is no mode": (mixture([8] * 15 + [-8]), False),
    "uniform": (torch.rand(500, 128, generator=torch.Generator().manual_seed(0)), False),
    "skewed": (randn(500, 128).exp(), False),
    "two modes and an outlier": (torch.cat([mixture([-8, 8]), torch.full((1, 128), 14.0)]), True),
    "an outlier far away": (torch.cat([mixture([-8, 8]), torch.full((1, 128), 500.0)]), False),
    "two values": (torch.tensor([-1.0, 1.0]).repeat(64).expand(500, 128), False),  # peaks at the ends are none
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_scipy_on_all_values(name):
    values, expected = CASES[name]
    verdict, y = definition(values)
    assert is_bimodal(values) is expected is verdict
    x = values.double().flatten()
    ours = density(x, 128) / float(x.max() - x.min())
    assert np.abs(ours - y).max() < 0.02 * y.max()


@settings(max_examples=40)
@given(
    gap=st.floats(0, 12),
    share=st.floats(0, 1),
    spread=st.floats(0.3, 3),
    count=st.integers(2, 8192),
    seed=st.integers(),
)
def test_up_to_8192_values_the_density_is_that_of_scipy(gap, share, spread, count, seed):
    generator = np.random.default_rng(abs(seed))
    x = generator.normal(size=count) + gap * (generator.random(count) < share) * generator.normal(1, spread, count)
    values = torch.from_numpy(x)
    verdict, y = definition(values)
    np.testing.assert_allclose(density(values, 128) / np.ptp(x), y, rtol=1e-6, atol=1e-9 * y.max())
    assert is_bimodal(values) == verdict


def test_the_sample_does_not_follow_the_channels():
    """524288 values: every 64th of them would come from 2 of the 128 channels only, both of one mode."""
    values = mixture([-8] * 32 + [8] * 32, tokens=4096)
    assert is_bimodal(values) and not is_bimodal(values[:, ::64])


@settings(max_examples=25)
@given(st.sampled_from(["two modes", "three modes", "unequal modes", "skewed"]), st.integers(0, 2**20))
def test_order_sign_and_units_do_not_matter(name, seed):
    values, expected = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    x = values.flatten()[torch.randperm(values.numel(), generator=generator)].view(-1, 64, 2)
    factor, shift = 10 ** (20 * torch.rand(1, generator=generator) - 10), randn(1, seed=seed)
    assert is_bimodal((x + shift) * factor) is is_bimodal(-x) is expected
    assert is_bimodal(x.half()) is expected


@pytest.mark.parametrize(
    "values",
    [torch.zeros(0, 4), torch.ones(1, 1), torch.full((7, 3), -2.5), torch.tensor([[1.0, 2.0]]), torch.arange(3.0)],
)
def test_degenerate_values_have_no_modes(values):
    assert is_bimodal(values) is False


def test_values_that_are_not_finite_are_named():
    for function in (is_bimodal, key_signs):
        with pytest.raises(ValueError, match="`values` must be finite, got 2 values"):
            function(torch.tensor([[1.0, math.nan], [-math.inf, 2.0]]))


def test_signs_are_those_of_the_means_and_never_zero():
    values = torch.tensor([[[-3.0, 5.0, 1.0, 0.0, -0.0]], [[1.0, -1.0, -1.0, 0.0, -0.0]]])
    signs = key_signs(values)
    assert signs.tolist() == [-1, 1, 1, 1, 1] and signs.dtype == torch.float32
    assert bool((key_signs(values * signs) == 1).all())


def random_attention(seed: int, heads: int, width: int, bias: bool) -> tuple[list[Tensor | None], Tensor]:
    channels = heads * width
    tensors = [randn(channels, 24, seed=seed), None, randn(channels, 16, seed=seed + 1), None]
    if bias:
        tensors[1], tensors[3] = randn(channels, seed=seed + 2), randn(channels, seed=seed + 3)
    return tensors, (torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < 0.5) * 2.0 - 1


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    heads=st.integers(1, 4),
    width=st.integers(1, 9),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_folding_keeps_every_bit_of_the_scores(seed, heads, width, bias, dtype):
    tensors, signs = random_attention(seed, heads, width, bias)
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    originals = [None if t is None else t.clone() for t in tensors]

    def project(weight, bias, x):
        return linear(x, weight, bias).view(2, -1, heads, width).transpose(1, 2)

    def scores(q_weight, q_bias, k_weight, k_bias):
        q = project(q_weight, q_bias, randn(2, 5, 24, seed=seed + 4).to(dtype))
        return q @ project(k_weight, k_bias, randn(2, 7, 16, seed=seed + 5).to(dtype)).transpose(-1, -2)

    folded = fold(*tensors, signs)
    assert torch.equal(scores(*folded), scores(*tensors))
    for new, old, original in zip(folded, tensors, originals, strict=True):
        if old is None:
            assert new is None
            continue
        assert new.dtype == dtype and torch.equal(old, original)
        assert torch.equal(new, torch.where((signs < 0).view(-1, *[1] * (old.ndim - 1)), -old, old))


def test_folding_leaves_one_mode_and_half_the_range():
    keys = mixture([-8, 8], tokens=400, channels=16)
    x = randn(400, 16, seed=9)
    k_weight = torch.linalg.lstsq(x, keys - keys.mean(0)).solution.T
    k_bias = keys.mean(0)
    before = linear(x, k_weight, k_bias)
    assert not is_bimodal(before * key_signs(before)) and is_bimodal(before)
    _, _, weight, bias = fold(k_weight, k_bias, k_weight, k_bias, key_signs(before))
    after = linear(x, weight, bias)
    assert float(after.amax() - after.amin()) < 0.6 * float(before.amax() - before.amin())


def test_shapes_and_signs_that_do_not_fit_are_named():
    (q_weight, q_bias, k_weight, k_bias), signs = random_attention(0, 2, 3, True)
    with pytest.raises(ValueError, match=r"`k_weight` must have 6 channels as `signs`, got shape \(5, 16\)"):
        fold(q_weight, q_bias, k_weight[:5], k_bias, signs)
    with pytest.raises(ValueError, match=r"`q_bias` must have 6 channels"):
        fold(q_weight, q_bias[:1], k_weight, k_bias, signs)
    with pytest.raises(ValueError, match=r"`signs` must hold a \+1 or -1 per channel"):
        fold(q_weight, q_bias, k_weight, k_bias, signs * torch.tensor([1.0, 1, 1, 0, 1, 1]))
