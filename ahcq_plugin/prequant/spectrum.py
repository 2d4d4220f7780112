# SPDX-License-Identifier: Apache-2.0
"""Singular values of a weight: taken apart, changed, put together again. What ACNR and CondiQuant share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioned:
    """A weight whose singular values were changed, with the values before and after.

    Attributes:
        weight: (out, in), dtype and device as given; the very object that was given where nothing changed.
        singular_before, singular_after: (min(out, in),) float64 on the CPU, descending; ``singular_after`` before
            ``weight`` was rounded to its dtype.
    """

    weight: Tensor
    singular_before: Tensor
    singular_after: Tensor

    @property
    def condition_before(self) -> float:
        """Largest by smallest singular value of the weight that was given."""
        return condition_number(self.singular_before)

    @property
    def condition_after(self) -> float:
        """Largest by smallest singular value of ``weight``."""
        return condition_number(self.singular_after)


def condition_number(values: Tensor) -> float:
    """Largest by smallest of the singular values (r,), r >= 1, in any order; inf where the smallest is 0."""
    smallest = float(values.min())
    return float(values.max()) / smallest if smallest > 0 else math.inf


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` = left @ diag(values) @ right, in float64 on the weight's device, r = min(out, in).

    In float64 because a small singular value is known only to the rounding of the largest one: with float32 condition
    numbers beyond 1e7 could not be told apart, and the vectors of the tail, to which the errors of ACNR belong, would
    be noise much earlier.

    Args:
        weight: (out, in) floats of any precision.
    Returns:
        left (out, r), values (r,) descending, right (r, in). Values that float64 cannot tell from 0 are exactly 0.
    Raises:
        ValueError: not a floating-point matrix, empty, or values that are not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            "`weight` must be a floating-point matrix (out, in) with at least one value, got "
            f"{weight.dtype} of shape {tuple(weight.shape)}; flatten the kernel of a convolution to (out, rest)"
        )
    broken = int((~weight.isfinite()).sum())
    if broken:
        raise ValueError(f"`weight` must be finite, got {broken} of {weight.numel()} values that are not")
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    noise = max(weight.shape) * torch.finfo(torch.float64).eps * values[0]
    return left, torch.where(values > noise, values, 0.0), right


def recompose(weight: Tensor, left: Tensor, values: Tensor, right: Tensor, changed: Tensor) -> Conditioned:
    """``weight`` with the singular values ``changed`` (r,) in place of ``values``, on the same singular vectors.

    Only the difference is added to ``weight``, so that directions whose value stays also keep their last bits in
    float64; the sum is rounded to the weight's dtype once.
    """
    before = values.cpu()
    moved = torch.nonzero(changed != values).flatten()
    if not len(moved):
        return Conditioned(weight, before, before)
    difference = (left[:, moved] * (changed - values)[moved]) @ right[moved]
    new = (weight.detach().double() + difference).to(weight.dtype)
    return Conditioned(new, before, changed.cpu().sort(descending=True).values)


def check_number(name: str, value: float, high: float = math.inf) -> None:
    """ValueError unless ``value`` is a number in [0, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ValueError(f"`{name}` must be a number in [0, {high}], got {value!r}")


def check_steps(steps: int) -> None:
    """ValueError unless ``steps`` is an integer >= 0."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"`steps` must be an integer of at least 0, got {steps!r}")
