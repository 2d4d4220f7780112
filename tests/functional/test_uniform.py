# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.functional import pieces, uniform
from ahcq_plugin.functional.uniform import UniformParams

bits_strategy = st.integers(2, 8)
range_strategy = st.tuples(st.floats(-1e3, 0, width=32), st.floats(0, 1e3, width=32))


def params_of(lo: float, hi: float, bits: int) -> UniformParams:
    return uniform.qparams_from_range(torch.tensor([lo]), torch.tensor([hi]), bits)


@given(range_strategy, bits_strategy)
def test_every_code_round_trips(bounds, bits):
    params = params_of(*bounds, bits)
    codes = torch.arange(2**bits)
    assert torch.equal(uniform.encode(uniform.decode(codes, params, bits), params, bits), codes)


@given(range_strategy, bits_strategy, st.integers(0, 2**31))
def test_decode_encode_is_idempotent_monotone_and_within_half_a_step(bounds, bits, seed):
    params = params_of(*bounds, bits)
    lo, hi = bounds
    x = torch.linspace(lo - 1, hi + 1, 257) + torch.rand(257, generator=torch.Generator().manual_seed(seed)) * 1e-3
    x = x.sort().values
    out = uniform.decode(uniform.encode(x, params, bits), params, bits)
    assert torch.equal(uniform.decode(uniform.encode(out, params, bits), params, bits), out)
    assert bool((out.diff() >= 0).all())
    grid = uniform.decode(torch.tensor([0, 2**bits - 1]), params, bits)
    inside = (x >= grid[0]) & (x <= grid[1])
    assert bool(((out - x).abs()[inside] <= params.scale / 2 * (1 + 1e-5) + 1e-6).all())


@given(range_strategy, bits_strategy)
def test_zero_is_exact(bounds, bits):
    params = params_of(*bounds, bits)
    assert uniform.decode(uniform.encode(torch.zeros(1), params, bits), params, bits).item() == 0.0


def test_against_numpy_half_to_even():
    """An independent float32 oracle, ties included."""
    params = UniformParams(torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32))
    x = torch.arange(-40, 41) * 0.125
    expected = np.clip(np.rint(x.numpy() / np.float32(0.5)) + 3, 0, 15).astype(np.int64)
    assert np.array_equal(uniform.encode(x, params, 4).numpy(), expected)


@settings(max_examples=30)
@given(st.integers(0, 2**31), bits_strategy, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_fake_quantize_is_decode_of_encode(seed, bits, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(7, 5, generator=generator) * 3).to(dtype)
    lo, hi = x.float().amin(0) * 0.7, x.float().amax(0) * 0.7
    params = uniform.qparams_from_range(lo, hi, bits)
    expected = uniform.decode(uniform.encode(x, params, bits), params, bits).to(dtype)
    assert torch.equal(uniform.fake_quantize(x, params, bits), expected)


def test_gradients_match_the_straight_through_definition():
    """Against autograd of the composition in which round has gradient 1."""

    def composed(x, scale, zero_point):
        ratio = x / scale
        rounded = ratio + (ratio.round() - ratio).detach()
        return ((rounded + zero_point).clamp(0, 15) - zero_point) * scale

    x = (torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    scale = torch.rand(6, generator=torch.Generator().manual_seed(1)).add_(0.05).requires_grad_()
    zero_point = torch.tensor([0, 3, 7, 8, 12, 15], dtype=torch.int32)
    weight = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((composed(x, scale, zero_point) * weight).sum(), (x, scale))
    out = uniform.fake_quantize(x, UniformParams(scale, zero_point), 4, grad_factor=0.25)
    ours = torch.autograd.grad((out * weight).sum(), (x, scale))
    torch.testing.assert_close(ours[0], grads[0])
    torch.testing.assert_close(ours[1], grads[1] * 0.25, rtol=1e-4, atol=1e-4)


def test_saturates_at_both_ends():
    params = params_of(-1.0, 1.0, 4)
    assert uniform.encode(torch.tensor([-1e9, 1e9, float("inf"), -float("inf")]), params, 4).tolist() == [0, 15, 15, 0]


@pytest.mark.parametrize("lo, hi", [(0.0, 0.0), (0.5, 2.0), (-2.0, -0.5)])
def test_range_always_contains_zero(lo, hi):
    params = params_of(lo, hi, 4)
    grid = uniform.decode(torch.tensor([0, 15]), params, 4)
    assert grid[0] <= min(lo, 0.0) + 1e-6 and grid[1] >= max(hi, 0.0) - 1e-6 and float(params.scale) > 0


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"`bits` must be an integer in \[2, 16\], got 1"):
        params_of(-1, 1, 1)
    with pytest.raises(ValueError, match="same shape"):
        UniformParams(torch.ones(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 15\] for 4 bits, got \[0, 16\]"):
        uniform.decode(torch.tensor([0, 16]), params_of(-1, 1, 4), 4)


LAYOUTS = {
    "as stored": lambda x: x,
    "permuted": lambda x: x.permute(2, 0, 1),
    "sliced": lambda x: x[:, 1:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1),
    "one axis of one": lambda x: x[:, None, 0],
    "empty": lambda x: x[:, :0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_nothing(monkeypatch, layout, per_channel, dtype):
    """Pieces of a few elements: values and gradients are those of the definition, whatever the layout in memory."""
    monkeypatch.setattr(pieces, "SIZE", 5)
    generator = torch.Generator().manual_seed(3)
    x = LAYOUTS[layout](torch.randn(4, 6, 8, generator=generator, dtype=torch.float64).to(dtype))
    channels = x.shape[-1] if per_channel else 1
    scale = torch.linspace(0.1, 0.4, channels).requires_grad_()
    zero_point = torch.arange(channels, dtype=torch.int32) % 16
    params = uniform.UniformParams(scale, zero_point)
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    leaf = x.detach().requires_grad_()
    out = uniform.fake_quantize(leaf, params, 4, 0.5)
    assert out.shape == x.shape and out.dtype == dtype
    with torch.no_grad():
        assert torch.equal(out, uniform.decode(uniform.encode(x, params, 4), params, 4).to(dtype))
    grad, grad_scale = torch.autograd.grad(out, [leaf, scale], upstream)
    ratio = x.float() / scale.detach()
    levels = (ratio.round() + zero_point).clamp(0, 15) - zero_point
    inside = (ratio - levels).abs() <= 0.5
    assert torch.equal(grad, (upstream.float() * inside).to(dtype))
    slope = torch.where(inside, levels - ratio, levels) * upstream.float()
    torch.testing.assert_close(grad_scale, 0.5 * slope.double().sum_to_size(scale.shape).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 8)])
def test_parameters_of_any_shape_that_broadcasts(shape):
    x = torch.linspace(-4, 4, 4 * 6 * 8).view(4, 6, 8).requires_grad_()
    scale = torch.full(shape, 0.3).requires_grad_()
    params = uniform.UniformParams(scale, torch.full(shape, 7))
    out = uniform.fake_quantize(x, params, 4)
    assert torch.equal(out, uniform.decode(uniform.encode(x, params, 4), params, 4))
    out.sum().backward()
    assert scale.grad.shape == shape and x.grad.shape == x.shape


def test_dense_layouts():
    x = torch.zeros(4, 6, 8)
    assert pieces.is_dense(x) and pieces.is_dense(x.permute(2, 0, 1)) and pieces.is_dense(x[:, :1, :1][:1])
    assert not pieces.is_dense(x[:, 1:]) and not pieces.is_dense(x[:, :1].expand(-1, 3, -1))


def test_pieces_on_other_devices_fit_what_torch_dot_takes():
    x = torch.empty(2**32 + 8, device="meta")
    assert [len(part) for part in pieces.flat_pieces(x)] == [2**30] * 4 + [8]
    assert len(pieces.flat_pieces(x[: 2**30])) == 1
