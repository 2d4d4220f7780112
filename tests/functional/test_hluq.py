# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ahcq_plugin.functional import hluq, uniform
from ahcq_plugin.functional.hluq import HLUQParams


def params_of(offset, scale_log, scale_uniform, log_levels):
    return HLUQParams(*(torch.tensor([v]) for v in (offset, scale_log, scale_uniform, log_levels)))


def test_layout_of_the_codes():
    params = params_of(0.0, 2.0, 0.5, 2)
    levels = hluq.decode(torch.arange(8), params, 3)
    assert levels.tolist() == [2.0, 1.0, 0.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    table = hluq.table(params, 3)
    expected = [2 * 2**-1.5, 2 * 2**-0.5, 2.25, 2.75, 3.25, 3.75, 4.25]
    assert table.boundaries.tolist() == torch.tensor(expected).tolist()
    assert table.top.item() == 4.75
    # the upper level on a boundary, and the hardware's label "code >= L" is true for zero and the uniform part
    assert hluq.encode(torch.tensor([0.0, 0.7, 0.71, 2.0, 2.25, 4.25, 9.0]), params, 3).tolist() == [
        2,
        2,
        1,
        0,
        3,
        7,
        7,
    ]


def test_large_values_do_not_collapse():
    """Published code sends uniform-part values above L to the lowest level."""
    params = params_of(0.0, 3.0, 0.5, 2)
    x = torch.linspace(3, 9, 100)
    out = hluq.fake_quantize(x, params, 4)
    assert bool(((out - x).abs() <= 0.25 + 1e-6).all())


def test_zero_is_exact_after_relu_and_the_offset_after_gelu():
    relu, gelu = params_of(0.0, 0.5, 0.2, 4), params_of(-0.17, 0.5, 0.2, 4)
    assert hluq.decode(hluq.encode(torch.zeros(1), relu, 4), relu, 4).item() == 0.0
    assert hluq.decode(torch.tensor([4]), gelu, 4).item() == torch.tensor(-0.17).item()
    assert hluq.encode(torch.tensor([-0.2, -0.17]), gelu, 4).tolist() == [4, 4]


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_sixteen_log_levels_stay_apart_beside_the_minimum_of_gelu(bits):
    levels = min(16, 2 ** (bits - 1))
    params = params_of(-0.17, 0.1, 0.9 / 2**bits, levels)
    decoded = hluq.decode(torch.arange(2**bits), params, bits)
    assert len(decoded.unique()) == 2**bits
    assert torch.equal(hluq.encode(decoded, params, bits), torch.arange(2**bits))


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1.0), st.floats(1e-7, 1.0), st.integers(3, 8))
def test_levels_survive_a_second_pass_even_where_float32_merges_them(offset, scale_log, scale_uniform, bits):
    params = params_of(offset, scale_log, scale_uniform, 2 ** (bits - 2) if bits < 6 else 16)
    decoded = hluq.decode(torch.arange(2**bits), params, bits)
    again = hluq.decode(hluq.encode(decoded, params, bits), params, bits)
    assert torch.equal(again, decoded)


def test_beats_uniform_on_gelu_activations_at_4_bits():
    x = F.gelu(torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)))
    lo, hi = x.min(), x.max()
    span = (hi - lo).item()
    params = params_of(lo.item(), 0.1 * span, 0.9 * span / (15 * 0.75), 4)
    plain = uniform.qparams_from_range(lo.view(1), hi.view(1), 4)
    error = (hluq.fake_quantize(x, params, 4) - x).abs().mean()
    assert error < 0.8 * (uniform.fake_quantize(x, plain, 4) - x).abs().mean()


@pytest.mark.parametrize("bits, levels, most", [(4, 0, 14), (4, 15, 14), (8, 17, 16), (2, 3, 2)])
def test_number_of_log_levels_is_checked(bits, levels, most):
    with pytest.raises(ValueError, match=rf"`log_levels` must be an integer in \[1, {most}\] for {bits} bits, got"):
        hluq.encode(torch.zeros(1), params_of(0.0, 1.0, 1.0, levels), bits)
