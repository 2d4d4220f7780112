# SPDX-License-Identifier: Apache-2.0
"""Gradients of the families with a table."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

_SPEC = importlib.util.spec_from_file_location("table_cases", Path(__file__).with_name("table_cases.py"))
_cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_cases)
FAMILIES, cases, example = _cases.FAMILIES, _cases.cases, _cases.example
scale_names, values_around = _cases.scale_names, _cases.values_around


def surrogate(case, y, y_hat, numbers, start):
    """y_hat as a smooth function of y and the scales: rounding residuals, relative to their scale, stay as they are.

    numbers, start: the scales now and where y_hat was computed; y, y_hat: float64 numpy without the offset.
    """
    offset = case.table.bottom.double().item()
    top = case.table.top.double().item() - offset
    if case.family == "hluq":
        split = case.params.log_levels.item()
        steps = 2**case.bits - 1 - split
        end = case.table.boundaries[split].double().item() - offset
        residual = [(y_hat - y) / s for s in start]
        moved = np.where(y < end, y + numbers[0] * residual[0], y + numbers[1] * residual[1])
        saturated = numbers[0] + steps * numbers[1]
    else:
        moved = y + (numbers[0] / start[0] if numbers else 1) * (y_hat - y)
        saturated = numbers[0] if numbers else top
    return np.where(y < 0, 0, np.where(y > top, saturated, moved))


@given(cases(offsets=st.sampled_from([0.0, -0.25])), st.integers(0, 1000), st.sampled_from([300, 20000]))
def test_scale_gradients_are_finite_differences_of_the_surrogate(case, seed, count):
    table, names = case.table, scale_names(case)
    x = values_around(table, count=count, seed=seed)
    x = x[torch.isfinite(x) & (x.abs() < 1e6)]
    weight = torch.randn(len(x), generator=torch.Generator().manual_seed(seed))
    learned = {name: getattr(case.params, name).clone().requires_grad_() for name in names}
    params = type(case.params)(**{**vars(case.params), **learned})
    x.requires_grad_()
    (FAMILIES[case.family].fake_quantize(x, params, case.bits) * weight).sum().backward()
    y = (x.detach().double() - table.bottom.double()).numpy()
    y_hat = (case.decode(case.encode(x.detach())).double() - table.bottom.double()).numpy()
    inside = (x.detach() >= table.bottom).numpy() & (x.detach() <= table.top).numpy()
    assert np.array_equal(x.grad.numpy(), weight.numpy() * inside)
    start = [getattr(case.params, name).double().item() for name in names]
    for k, name in enumerate(names):
        ends = []
        for sign in (1, -1):
            numbers = list(start)
            numbers[k] += sign * 0.25 * start[k]
            ends.append(surrogate(case, y, y_hat, numbers, start))
        slopes = (ends[0] - ends[1]) / (0.5 * start[k]) * weight.double().numpy()
        assert learned[name].grad.item() == pytest.approx(slopes.sum(), abs=1e-4 * np.abs(slopes).sum() + 1e-5)


@given(cases(families=("hluq", "agq", "power_of_two")), st.floats(0.01, 10))
def test_gradients_of_scales_take_the_factor(case, factor):
    def grads(grad_factor):
        learned = {n: getattr(case.params, n).clone().requires_grad_() for n in scale_names(case)}
        params = type(case.params)(**{**vars(case.params), **learned})
        x = torch.linspace(-1, 2, 50).mul_(float(case.table.top)).requires_grad_()
        FAMILIES[case.family].fake_quantize(x, params, case.bits, grad_factor).sum().backward()
        return x.grad, torch.cat([t.grad for t in learned.values()])

    (x_one, one), (x_other, other) = grads(1.0), grads(factor)
    assert torch.equal(x_one, x_other) and bool((one != 0).any())
    torch.testing.assert_close(other, one * factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_end_where_the_docstrings_say(family):
    case = example(family)
    last = {"hluq": 0.5 + 11 * 0.1 + 0.05}.get(family, 0.5)
    assert case.table.bottom.item() == 0.0 and case.table.top.item() == pytest.approx(last, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_other_dtypes_are_those_of_float32(family, dtype):
    case = example(family)
    grads = []
    for kind in (dtype, torch.float32):
        learned = {n: getattr(case.params, n).clone().requires_grad_() for n in scale_names(case)}
        params = type(case.params)(**{**vars(case.params), **learned})
        x = torch.linspace(-0.1, 2.0, 4000).to(dtype).to(kind).requires_grad_()
        out = FAMILIES[family].fake_quantize(x, params, 4)
        out.backward(torch.ones_like(out))
        assert x.grad.dtype == kind
        grads.append([x.grad.float(), *(t.grad for t in learned.values())])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
