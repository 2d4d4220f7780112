# SPDX-License-Identifier: Apache-2.0
"""What candidate parameters of a quantizer are judged by: the error of what the quantized tensor leads to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ahcq_plugin.quantizers.sampling import spread_rows

SCORED_OUTPUTS = 2**19


class Scores:
    """Sums over items of each candidate's error, in float64.

    Args:
        candidates: parameters to choose from.
        quantize: ``quantize(x, candidate)`` gives x_hat in x's dtype.
        power: the error of an item is mean |product(x_hat) - product(x)|^power.
    """

    def __init__(self, candidates: Sequence[Any], quantize: Callable[[Tensor, Any], Tensor], power: float):
        self.candidates, self.quantize, self.power = list(candidates), quantize, power
        self.errors: Tensor | None = None

    def add(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """Add one item; an empty one adds nothing."""
        if x.numel():
            self.add_errors(self.judge(x, product))

    @torch.no_grad()
    def judge(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Every candidate's error on an item that is not empty, float64 (candidates,).

        Where the product is much larger than x (a query times all keys) fewer rows are judged.
        """
        wanted = product(x)
        if wanted.numel() > SCORED_OUTPUTS:
            x = spread_rows(x, x.numel() * SCORED_OUTPUTS // wanted.numel())
            wanted = product(x)
        wanted, errors = wanted.double(), []
        for candidate in self.candidates:
            error = product(self.quantize(x, candidate)).double().sub_(wanted).abs_()
            # exp(p log e) is several times faster than pow on a CPU, and 0 stays 0
            errors.append((error.square_() if self.power == 2 else error.log_().mul_(self.power).exp_()).mean())
        # a candidate whose product overflows half precision has lost
        return torch.stack(errors).nan_to_num_(nan=math.inf)

    def add_errors(self, errors: Tensor) -> None:
        """Add what ``judge`` gave."""
        self.errors = errors if self.errors is None else self.errors.to(errors.device) + errors

    def best(self) -> Any:
        """The candidate of the least error, the first of equal ones."""
        return self.candidates[int(torch.argmin(self.errors))]
