# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ahcq_plugin.prequant.ridge import RidgeSums


def rows(count, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) + 0.7
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    y = x @ weight.T + bias
    return (x + 0.3 * torch.randn(x.shape, generator=generator)).round(decimals=1), y, weight, bias


def summed(x, y, parts=1):
    sums = RidgeSums(x.shape[-1], y.shape[-1])
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        sums.add(a, b)
    return sums


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strength", [1e-9, 0.03, 2.0])
def test_it_is_the_least_squares_solution_with_the_penalty_as_rows_of_its_own(with_bias, strength):
    """An oracle in numpy: sqrt(lam) I as further rows, their target the old weight; the bias a column without."""
    x, y, weight, bias = rows(200, 7, 4)
    new, shift = summed(x, y, 3).solve(weight, bias if with_bias else None, strength)
    a, b, old = (t.double().numpy() for t in (x, y, weight))
    root = np.sqrt(strength * (a**2).sum(0).mean())
    columns = [a, np.ones((len(a), 1))] if with_bias else [a]
    held = [root * np.eye(7), np.zeros((7, 1))] if with_bias else [root * np.eye(7)]
    system = np.concatenate([np.concatenate(columns, 1), np.concatenate(held, 1)])
    wanted = np.linalg.lstsq(system, np.concatenate([b, root * old.T]), rcond=None)[0].T
    np.testing.assert_allclose(new.numpy(), wanted[:, :7], rtol=1e-5, atol=1e-6)
    if with_bias:
        np.testing.assert_allclose(shift.numpy(), wanted[:, 7], rtol=1e-5, atol=1e-6)
    else:
        assert shift is None


def test_the_output_error_falls_most_where_the_weight_is_free():
    x, y, weight, bias = rows(500, 12, 5)
    errors, moves = [((x @ weight.T + bias) - y).square().mean().item()], [0.0]
    for strength in (1.0, 0.1, 0.01):
        new, shift = summed(x, y).solve(weight, bias, strength)
        errors.append((x @ new.T + shift - y).square().mean().item())
        moves.append((new - weight).norm().item())
    assert errors == sorted(errors, reverse=True) and moves == sorted(moves)


def test_inputs_without_error_leave_the_layer_as_it_is():
    x, _, weight, bias = rows(300, 6, 3)
    new, shift = summed(x, x @ weight.T + bias).solve(weight, bias, 0.03)
    assert torch.allclose(new, weight, atol=1e-5) and torch.allclose(shift, bias, atol=1e-5)


def test_what_says_nothing_changes_nothing():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    for sums in (RidgeSums(4, 3), summed(torch.zeros(5, 4), torch.ones(5, 3))):
        new, shift = sums.solve(weight, bias, 0.03)
        assert torch.equal(new, weight) and torch.equal(shift, bias)
    assert RidgeSums(4, 3).rows == 0 and summed(torch.zeros(2, 5, 4), torch.ones(2, 5, 3)).rows == 10


def test_more_channels_than_rows_and_half_precision():
    x, y, weight, bias = rows(3, 9, 2)
    new, shift = summed(x, y).solve(weight.half(), bias.half(), 0.01)
    assert new.dtype == shift.dtype == torch.float16 and bool(new.isfinite().all())


def test_values_that_are_not_finite_are_named():
    x, y, weight, bias = rows(5, 3, 2)
    with pytest.raises(ValueError, match="inputs and outputs must be finite"):
        summed(x, y / 0).solve(weight, bias, 0.03)
