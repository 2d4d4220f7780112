# SPDX-License-Identifier: Apache-2.0
"""Activation-aware condition number reduction (ACNR, AHCQ-SAM eq. 7-13).

Each step minimises 1/2 |W' - W|^2 + lam * sum (sigma' - t)^2 + beta * E|dX W'|^2 over the singular values, the vectors
kept: sigma' = (sigma + 2 lam t) / (1 + 2 lam + 2 beta e). t is the mean singular value, e_i = E (dX u_i)^2 the error of
the quantized input along the singular vector u_i on the input side. Leading values, up to and including the first at
which the energy exceeds 80 %, stay; the others only rise. So the largest singular value stays, the smallest never
falls, and the condition number never rises.

The definition takes 200 steps with two SVDs and all activation errors each. But the vectors never change: one SVD and
one Gram matrix G = dX^T dX / rows give all e_i = u_i^T G u_i, and the steps are left to a few hundred scalars. That is
no approximation: values that overtake one another in a step are sorted again and take their e_i along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import spectrum
from .spectrum import Conditioned

_BLOCK = 256  # columns of a Gram matrix computed at a time
# What float32 sums over many rows may lack in symmetry and definiteness, as a share of the largest entry.
_GRAM_TOLERANCE = 1e-3


@torch.no_grad()
def condition_weight(
    weight: Tensor,
    error_gram: Tensor,
    lam: float = 0.003,
    beta: float = 0.001,
    energy: float = 0.8,
    threshold: float = 100.0,
    steps: int = 200,
) -> Conditioned:
    """``weight`` with a smaller condition number, computed in float64 and rounded to the weight's dtype once.

    Args:
        weight: (out, in) floats of a Linear.
        error_gram: (in, in) floats, dX^T dX / rows, dX (rows, in) the error of the layer's quantized input.
        lam: >= 0, pull of the singular values towards their mean.
        beta: >= 0, how much the activation error holds back the rise of a value.
        energy: share in [0, 1] of the squared singular values that is protected, the value that exceeds it included.
        threshold: a weight whose condition number is not above it is returned as it is (the same object); 0: none is.
        steps: >= 0; the paper takes at most 200.
    Returns:
        ``Conditioned``. Its weight is the given object also where no value had to rise. Missing ranks (condition
        number inf) are filled in along the vectors that the SVD happens to return for them.
    Raises:
        ValueError: a wrong argument; a weight or Gram matrix that is not finite; a Gram matrix of the wrong shape, not
            symmetric or not positive semi-definite (up to 1e-3 of its largest entry).
    """
    for name, value in (("lam", lam), ("beta", beta)):
        spectrum.check_number(name, value, high=1e6)
    spectrum.check_number("energy", energy, high=1)
    spectrum.check_number("threshold", threshold)
    spectrum.check_steps(steps)
    left, values, right = spectrum.decompose(weight)
    gram, tolerance = _checked_gram(error_gram, weight)
    if spectrum.condition_number(values) <= threshold:
        return Conditioned(weight, values.cpu(), values.cpu())
    errors = (right @ gram * right).sum(1)
    if float(errors.min()) < -tolerance:
        raise ValueError(
            f"`error_gram` must be positive semi-definite, got the error {float(errors.min()):.3g} along a singular "
            "vector; pass dX^T dX / rows"
        )
    raised = raise_tail(values, errors.clamp(min=0), lam, beta, energy, steps)
    return spectrum.recompose(weight, left, values, right, raised)


def raise_tail(values: Tensor, errors: Tensor, lam: float, beta: float, energy: float, steps: int) -> Tensor:
    """Singular values (r,) after ``steps`` steps, each at the place where it was in ``values``.

    Args:
        values: float64, >= 0, in any order.
        errors: float64, >= 0, (r,), the activation error along the singular vector of each value.
    Returns:
        float64 (r,) on the device of ``values``; none is below what it was. Computed on the CPU, where a few hundred
        numbers are faster than on a GPU.
    """
    now, errors = values.cpu(), errors.cpu()
    place = torch.arange(len(now))
    for _ in range(steps):
        now, order = now.sort(descending=True, stable=True)
        errors, place = errors[order], place[order]
        # Relative to the largest, so that squares neither overflow nor vanish.
        cumulative = (now / now[0].clamp(min=torch.finfo(now.dtype).tiny)).square().cumsum(0)
        protected = int((cumulative <= energy * cumulative[-1]).sum()) + 1
        candidate = (now + 2 * lam * now.mean()) / (1 + 2 * lam + 2 * beta * errors)
        now = torch.cat([now[:protected], torch.maximum(now, candidate)[protected:]])
    return torch.empty_like(now).index_copy_(0, place, now).to(values.device)


class ErrorGram:
    """Sum of dX^T dX over calls of ``add``, as ``condition_weight`` wants it.

    Half the cost of ``dX.T @ dX``: what symmetry repeats is not computed.

    Args:
        channels: number of input channels.
        device: where the errors are.
        dtype: of the sum.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self._sum = torch.zeros(channels, channels, device=device, dtype=dtype)  # on and right of the diagonal blocks
        self.rows = 0

    @torch.no_grad()
    def add(self, errors: Tensor) -> None:
        """Take in errors (..., channels)."""
        x = errors.detach().reshape(-1, errors.shape[-1]).to(self._sum.dtype)
        for start in range(0, x.shape[1], _BLOCK):
            stop = start + _BLOCK
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.rows += len(x)

    def mean(self) -> Tensor:
        """dX^T dX / rows, (channels, channels), exactly symmetric; zeros if nothing was added."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / max(self.rows, 1)


def _checked_gram(gram: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """The Gram matrix in float64 on the weight's device, and how far below 0 rounding may bring its errors."""
    channels = weight.shape[1]
    if gram.shape != (channels, channels) or not gram.is_floating_point():
        raise ValueError(
            f"`error_gram` must be a floating-point matrix of shape {(channels, channels)}, a row per input channel of "
            f"`weight` {tuple(weight.shape)}, got {gram.dtype} of shape {tuple(gram.shape)}"
        )
    gram = gram.detach().to(weight.device, torch.float64)
    if not bool(gram.isfinite().all()):
        raise ValueError("`error_gram` must be finite; is the layer's input, or a scale of its quantizer, not finite?")
    tolerance = _GRAM_TOLERANCE * float(gram.abs().max())
    asymmetry = float((gram - gram.T).abs().max())
    if asymmetry > tolerance:
        raise ValueError(
            f"`error_gram` must be symmetric, got entries that differ by {asymmetry:.3g} from their transposes; pass "
            "dX^T dX / rows"
        )
    if float(gram.diagonal().min()) < -tolerance:
        raise ValueError(
            f"`error_gram` must be positive semi-definite, got {float(gram.diagonal().min()):.3g} on its diagonal; "
            "pass dX^T dX / rows"
        )
    return gram, tolerance
