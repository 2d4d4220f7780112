# SPDX-License-Identifier: Apache-2.0
"""The compiled fake quantizers give what PyTorch's operators give, and their sums are those of float64."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional import hluq, kernels, lnq, uniform
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.support import cpp_library

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from([None, 0.0, 0.3, 0.5, 1.0])


def operators(function):
    """What ``function`` gives without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        return function()


def gradients(quantize, x, drop, *learned):
    """x_hat, and the gradients of x and of what is learned, of copies."""
    x, *learned = (t.detach().clone().requires_grad_() for t in (x, *learned))
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    out = quantize(x, drop, *learned)
    return out, *torch.autograd.grad(out, (x, *learned), above)


def drop_of(x, share):
    return None if share is None else Drop.draw(x, share)


def assert_equal(ours, theirs):
    """x_hat and the gradient of x to the bit, sums to the rounding of float32 sums."""
    assert ours[0].is_contiguous() == theirs[0].is_contiguous()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(mine.nan_to_num(1e30), other.nan_to_num(1e30))
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def numbers(shape, generator):
    """Numbers around a range of codes, some half-way between two levels, in memory in any order of the axes."""
    order = torch.randperm(len(shape), generator=generator).tolist()
    x = torch.randn([shape[axis] for axis in order], generator=generator) * 3
    half_way = torch.rand(x.shape, generator=generator) < 0.2
    x = torch.where(half_way, (x * 2).round() / 2, x)
    return x.permute([order.index(axis) for axis in range(len(shape))])


@given(SHAPES, SEEDS, st.integers(2, 8), st.integers(-1, 3), SHARES)
def test_uniform(shape, seed, bits, axis, share):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = numbers(shape, generator)
    parameters = [1] * len(shape)
    if 0 <= axis < len(shape):
        parameters[axis] = shape[axis]
    scale = torch.rand(parameters, generator=generator) + 0.25
    zero_point = torch.randint(0, 2**bits, parameters, generator=generator)
    drop = drop_of(x, share)

    def run():
        def quantize(x, drop, scale):
            return uniform.fake_quantize(x, uniform.UniformParams(scale, zero_point), bits, 0.5, drop)

        return gradients(quantize, x, drop, scale)

    assert kernels.rows(x, scale) is not None
    assert_equal(run(), operators(run))


@given(SHAPES, SEEDS, st.integers(2, 8), SHARES)
def test_tables(shape, seed, bits, share):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = numbers(shape, generator)
    parameters = (torch.rand(3, generator=generator) + 0.2).split(1)
    split = torch.randint(1, min(16, 2**bits - 2) + 1, (1,), generator=generator)
    drop = drop_of(x, share)

    def learned(x, drop, scale_log, scale_uniform):
        params = hluq.HLUQParams(-parameters[0], scale_log, scale_uniform, split)
        return hluq.fake_quantize(x, params, bits, 0.5, drop)

    def static(x, drop):
        return lnq.fake_quantize(x, lnq.LNQParams(10 * parameters[0], 3 * parameters[1]), bits, drop=drop)

    for run in (lambda: gradients(learned, x, drop, *parameters[1:]), lambda: gradients(static, x, drop)):
        assert_equal(run(), operators(run))


@pytest.mark.parametrize("share", [None, 0.5])
def test_what_is_not_finite(share):
    x = torch.tensor([math.nan, 0.3, -math.nan, 5.0] + [math.inf, -math.inf] * (share is None)).repeat(50)
    drop = drop_of(x, share)
    params = uniform.UniformParams(torch.tensor([0.5]), torch.tensor([3]))

    def run():
        with torch.no_grad():
            table = lnq.fake_quantize(x, lnq.LNQParams(torch.tensor([2.0]), torch.tensor([1.0])), 4, drop=drop)
            return uniform.fake_quantize(x, params, 4, drop=drop), table

    for ours, theirs in zip(run(), operators(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_sums_are_those_of_float64_whatever_the_number_of_threads():
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    drop = drop_of(x, 0.5)
    chosen = drop.dice < drop.threshold
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for shape in ((1,), (700,), (300, 1)):
        scale, zero_point = torch.full(shape, 0.2), torch.full(shape, 7)
        ratio = x / scale
        levels = (ratio.round() + 7).clamp(0, 15) - 7
        slope = torch.where((ratio - levels).abs() <= 0.5, levels - ratio, levels)
        wanted = (torch.where(chosen, slope, 0.0) * above).double().sum_to_size((1,) * (2 - len(shape)) + shape)
        found = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                kernel = kernels.Uniform(kernels.rows(x, scale), scale, zero_point.float(), 15)
                found.append(kernel.gradients(x, above, drop.dice, drop.threshold, True)[1])
            finally:
                torch.set_num_threads(before)
        torch.testing.assert_close(found[0], wanted.flatten(), rtol=1e-12, atol=1e-9)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.ones(3, requires_grad=True)
    params = uniform.UniformParams(torch.ones(1), torch.ones(1))
    (grad,) = torch.autograd.grad(uniform.fake_quantize(x, params, 4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, device="meta"), torch.zeros(4, 4)[:, ::2]],
    ids=["half", "meta", "strided"],
)
def test_operators_take_the_rest(tensor):
    assert not kernels.usable(tensor)
    assert kernels.usable(torch.zeros(4, 4).t())


def test_without_a_compiler_operators_do_it_and_it_is_said_once(monkeypatch, caplog):
    def load(source):
        raise RuntimeError("no C++ compiler on PATH")

    monkeypatch.setattr(cpp_library, "load", load)
    kernels.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [kernels.usable(torch.zeros(3)) for _ in range(2)] == [False, False]
        assert [record.getMessage().count("no C++ compiler") for record in caplog.records] == [1]
    finally:
        monkeypatch.undo()
        kernels.library.cache_clear()
