# SPDX-License-Identifier: Apache-2.0
"""CondiQuant's spread-to-mean step on the singular values, without data: a baseline for ACNR.

CondiQuant (Liu et al., arXiv 2502.15478) alternates gradient steps on a layer's output error with a proximal step that
draws the singular values together. This is its proximal step alone, the minimiser of
1/2 (sigma' - sigma)^2 + lam (sigma' - t)^2 with t the mean singular value: sigma' = (sigma + 2 lam t) / (1 + 2 lam).
It is ACNR for isotropic errors and nothing protected: the large values fall as the small ones rise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import spectrum
from .spectrum import Conditioned


@torch.no_grad()
def condition_weight_isotropic(
    weight: Tensor, lam: float = 0.003, threshold: float = 100.0, steps: int = 200
) -> Conditioned:
    """``weight`` with all singular values drawn to their mean, computed in float64, rounded to the weight's dtype once.

    Args:
        weight: (out, in) floats of a Linear.
        lam: >= 0, pull of the singular values towards their mean.
        threshold: a weight whose condition number is not above it is returned as it is (the same object); 0: none is.
        steps: >= 0. A step keeps the mean t and shortens every distance to it by 1 / (1 + 2 lam), so that all of them
            together are t + (sigma - t) / (1 + 2 lam)^steps.
    Returns:
        ``Conditioned``. Missing ranks (condition number inf) are filled in along the vectors that the SVD happens to
        return for them.
    Raises:
        ValueError: a wrong argument; a weight that is not finite.
    """
    spectrum.check_number("lam", lam, high=1e6)
    spectrum.check_number("threshold", threshold)
    spectrum.check_steps(steps)
    left, values, right = spectrum.decompose(weight)
    if spectrum.condition_number(values) <= threshold:
        return Conditioned(weight, values.cpu(), values.cpu())
    mean = values.mean()
    # a negative power goes to 0 where (1 + 2 lam)^steps would overflow; without a pull not even the last bit moves
    changed = mean + (values - mean) * (1 + 2 * lam) ** -steps if lam and steps else values
    return spectrum.recompose(weight, left, values, right, changed)
