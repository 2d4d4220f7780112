# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional import lnq
from ahcq_plugin.functional.lnq import LNQParams

shapes = st.sampled_from([0.001, 0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 2000.0, 5000.0])


def params_of(shape_factor, clip):
    return LNQParams(torch.tensor([shape_factor]), torch.tensor([clip]))


@given(shapes, st.floats(1e-8, 1.0), st.integers(2, 8))
def test_ends_are_zero_and_the_clip(shape, clip, bits):
    params = params_of(shape, clip)
    levels = lnq.decode(torch.arange(2**bits), params, bits)
    assert levels[0] == 0.0 and levels[-1] == params.clip
    integers = lnq.integer_levels(params, bits)
    assert integers.dtype == torch.int64 and integers[0] == 0 and integers[-1] == 2**lnq.DECODE_FRACTION_BITS


def test_a_small_shape_factor_is_nearly_uniform_and_a_large_one_fine_near_zero():
    flat = lnq.decode(torch.arange(16), params_of(0.001, 1.0), 4)
    torch.testing.assert_close(flat, torch.arange(16) / 15, atol=2e-4, rtol=0)
    steep = lnq.decode(torch.arange(16), params_of(200.0, 1.0), 4)
    assert steep[1] < 0.003 and bool((steep.diff().diff() > 0).all())


@given(shapes, st.floats(1e-8, 1.0), st.integers(2, 8), st.integers(8, 24))
def test_integer_levels_are_the_levels_rounded(shape, clip, bits, fraction_bits):
    params = params_of(shape, clip)
    integers = lnq.integer_levels(params, bits, fraction_bits).double()
    exact = lnq.decode(torch.arange(2**bits), params, bits).double() / params.clip.double() * 2**fraction_bits
    assert bool(((integers - exact).abs() <= 0.5 + 1e-6 * exact).all())


@given(shapes, st.floats(1e-8, 1.0), st.integers(2, 8))
def test_rounded_levels_keep_their_codes(shape, clip, bits):
    params = params_of(shape, clip)
    levels = lnq.integer_levels(params, bits).float() * params.clip * 2.0**-lnq.DECODE_FRACTION_BITS
    assert len(levels.unique()) == 2**bits
    codes = torch.arange(2**bits)
    assert torch.equal(lnq.encode(levels, params, bits), codes)
    assert torch.equal(lnq.decode(codes, params, bits, levels), levels)
    x = torch.linspace(-0.1, 1.2, 1000) * clip
    assert torch.equal(lnq.fake_quantize(x, params, bits, levels), levels[lnq.encode(x, params, bits)])


def test_levels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"`levels` must have shape \(16,\) for 4 bits, got \(8,\)"):
        lnq.decode(torch.zeros(1), params_of(1.0, 1.0), 4, torch.zeros(8))
