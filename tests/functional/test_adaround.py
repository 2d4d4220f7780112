# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.functional import adaround, uniform


def setup(seed: int, bits: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 9, generator=generator)
    params = uniform.qparams_from_range(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits)
    return weight, params, generator


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_initial_soft_weight_is_the_weight(seed, bits):
    weight, params, _ = setup(seed, bits)
    alpha = adaround.init_alpha(weight, params)
    soft = adaround.soft_weight(adaround.floor_base(weight, params), alpha, params, bits)
    lo, hi = (uniform.decode(torch.tensor([c]), params, bits) for c in (0, 2**bits - 1))
    torch.testing.assert_close(soft, weight.clamp(lo, hi), rtol=0, atol=float(params.scale.max()) * 1e-4)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_hard_codes_are_floor_or_ceil_by_the_sign_of_alpha(seed, bits):
    weight, params, generator = setup(seed, bits)
    alpha = torch.randn(weight.shape, generator=generator)
    codes = adaround.hard_codes(weight, alpha, params, bits)
    down = torch.floor(weight / params.scale) + params.zero_point
    expected = torch.where(alpha >= 0, down + 1, down).clamp(0, 2**bits - 1).long()
    assert torch.equal(codes, expected)


def test_saturated_alpha_makes_soft_equal_hard():
    weight, params, generator = setup(0, 4)
    alpha = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, 9.0, -9.0)
    soft = adaround.soft_weight(adaround.floor_base(weight, params), alpha, params, 4)
    hard = uniform.decode(adaround.hard_codes(weight, alpha, params, 4), params, 4)
    assert torch.equal(soft, hard)
    assert adaround.rounding_regularizer(alpha, 20.0).item() == 0.0


def test_regularizer_is_largest_when_undecided_and_pushes_apart():
    alpha = torch.tensor([0.2, -0.2], requires_grad=True)
    value = adaround.rounding_regularizer(alpha, 2.0)
    assert 0 < value.item() < adaround.rounding_regularizer(torch.zeros(2), 2.0).item() == 2.0
    gradient = torch.autograd.grad(value, alpha)[0]
    assert gradient[0] < 0 < gradient[1]
