# SPDX-License-Identifier: Apache-2.0
"""What goes into ACNR: dtypes and devices, Gram matrices, arguments that are errors."""

from __future__ import annotations

import math

import pytest
import torch

from ahcq_plugin.prequant.acnr import ErrorGram, condition_weight
from ahcq_plugin.prequant.spectrum import condition_number
from ahcq_plugin.studies.reference.acnr import error_rows, gram_of, ill_weight, randn

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_device_are_kept_and_rounding_happens_once(device, dtype):
    weight, gram = ill_weight(24, 16).to(device, dtype), gram_of(error_rows(16, 1.0)).float()
    new = condition_weight(weight, gram).weight  # the Gram matrix may be elsewhere
    assert new.dtype == dtype and new.device == weight.device
    exact = condition_weight(weight.double(), gram).weight
    assert bool(((new.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all())


@pytest.mark.parametrize("channels", [1, 5, 256, 300])
def test_error_gram_is_the_mean_of_the_products(channels):
    chunks = [randn(2, 3, channels), randn(9, channels, seed=1), randn(0, channels)]
    gram = ErrorGram(channels, dtype=torch.float64)
    assert not gram.mean().any()
    for chunk in chunks:
        gram.add(chunk)
    rows = torch.cat([chunk.reshape(-1, channels) for chunk in chunks])
    assert gram.rows == 15 and torch.equal(gram.mean(), gram.mean().T)
    torch.testing.assert_close(gram.mean(), rows.T @ rows / 15, rtol=1e-12, atol=1e-12)
    assert gram.rows == 15


def test_errors_that_float32_rounds_below_zero_are_accepted():
    """All error rows alike: along the singular vectors at right angles to them there is only rounding."""
    row = 100 * randn(1, 64, seed=5)
    _, values, _ = torch.linalg.svd(ill_weight(64, 64))
    right = torch.linalg.qr(torch.cat([row, randn(63, 64)]).T)[0].T
    gram = ErrorGram(64)
    gram.add(row.float().repeat(50, 1))
    assert float((right @ gram.mean().double() * right).sum(1).min()) < 0
    assert condition_weight(values.diag() @ right, gram.mean()).condition_after < 100


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"matrix \(out, in\).*shape \(3,\)"),
        (torch.ones(3, 2, 1, 1), "flatten the kernel"),
        (torch.ones(0, 4), r"at least one value.*\(0, 4\)"),
        (torch.ones(4, 4, dtype=torch.int64), "torch.int64"),
        (torch.tensor([[1.0, math.nan], [math.inf, 0]]), "finite, got 2 of 4"),
    ],
)
def test_a_bad_weight_is_named(weight, message):
    with pytest.raises(ValueError, match=f"`weight` must.*{message}"):
        condition_weight(weight, torch.eye(2))


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(3), r"\(2, 2\).*got torch.float32 of shape \(3, 3\)"),
        (torch.eye(2, dtype=torch.int64), "torch.int64"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), "finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric.*differ by 0.5"),
        (torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), "semi-definite, got -1 on its diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "semi-definite.*along a singular vector"),
    ],
)
def test_a_bad_gram_matrix_is_named(gram, message):
    weight = torch.tensor([[1.0, -1.0], [1e-3, 1e-3]])
    with pytest.raises(ValueError, match=f"`error_gram` must.*{message}"):
        condition_weight(weight, gram)


@pytest.mark.parametrize("name", ["lam", "beta", "energy", "threshold", "steps"])
@pytest.mark.parametrize("value", [-1, math.nan, "1", True, None])
def test_a_bad_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* got {value!r}"):
        condition_weight(torch.eye(2), torch.eye(2), **{name: value})


def test_limits_of_numbers():
    for bad in ({"energy": 1.01}, {"lam": math.inf}, {"steps": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            condition_weight(torch.eye(2), torch.eye(2), **bad)
    assert condition_number(torch.tensor([4.0, 2.0])) == 2
    assert condition_number(torch.tensor([4.0, 0.0])) == math.inf
    weight = ill_weight(4, 4)
    assert condition_weight(weight, torch.eye(4), threshold=math.inf).weight is weight
