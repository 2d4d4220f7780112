# SPDX-License-Identifier: Apache-2.0
"""Ridge regression of a layer on inputs that carry an error: the weight that makes the best of them (ERQ, 2407.06794).

Least squares of y - x W'^T - b' over all rows, the new weight held to the old one: with penalty lam |W' - W|^2 the
minimiser has a closed form, and all data enter by a few sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RidgeSums:
    """Sums over calls of ``add``, in float64: all that the normal equations of x -> y need.

    Args:
        inputs, outputs: numbers of channels of x and y.
        device: where x and y are.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        zeros = torch.zeros(inputs + 1, inputs + outputs + 1, dtype=torch.float64, device=device)
        self._sums, self._inputs = zeros, inputs  # [x 1]^T [x 1 y]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x (..., inputs) and what a layer should make of them, y (..., outputs)."""
        left, right = (t.detach().reshape(-1, t.shape[-1]).double() for t in (x, y))
        left = torch.cat([left, left.new_ones(len(left), 1)], 1)
        self._sums += left.T @ torch.cat([left, right], 1)

    @property
    def rows(self) -> int:
        """Taken in."""
        return int(self._sums[self._inputs, self._inputs])

    @torch.no_grad()
    def solve(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of least sum |y - x W'^T - b'|^2 + lam |W' - W|^2, computed in float64; the bias is free.

        Args:
            weight: (outputs, inputs) floats, the layer's W.
            bias: (outputs,) floats; None: the layer has none and gets none.
            strength: > 0; lam is so much of the mean of x's squares, summed over the rows.
        Returns:
            New tensors in the dtypes of the arguments. The old ones without rows, and where x is 0 throughout.
        Raises:
            ValueError: sums that are not finite.
        """
        if not bool(self._sums.isfinite().all()):
            raise ValueError("inputs and outputs must be finite: look for NaN or overflow in the model")
        k, rows = self._inputs, self.rows
        squares, products = self._sums[:k, :k], self._sums[:k, k + 1 :]
        penalty = strength * squares.diagonal().mean()
        if not rows or not float(penalty):
            return weight.clone(), None if bias is None else bias.clone()
        mean_x, mean_y = self._sums[:k, k] / rows, self._sums[k, k + 1 :] / rows
        if bias is not None:  # a free bias takes the means up
            squares = squares - rows * torch.outer(mean_x, mean_x)
            products = products - rows * torch.outer(mean_x, mean_y)
        old = weight.double()
        held = squares + penalty * torch.eye(k, dtype=torch.float64, device=squares.device)
        change = torch.linalg.solve(held, products - squares @ old.T)
        new = old + change.T
        return new.to(weight.dtype), None if bias is None else (mean_y - new @ mean_x).to(bias.dtype)
