# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices, AdamW for the rest.

Muon (K. Jordan et al., 2024) replaces the momentum of a weight matrix by the nearest matrix with orthonormal rows or
columns, found by a few Newton-Schulz steps. With the scale of "Muon is scalable for LLM training" (2025), 0.2 times
the square root of the longer side, one learning rate and weight decay serve both kinds of parameters. From nothing and
with few images it needs a fraction of the steps of AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of (N, m, n) matrices towards one, to within about a third; bfloat16 inside."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None] * 1.01)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov), orthogonalised. Parameters with more than two dimensions count as matrices (first, rest);
    those of one shape go through the iteration together."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon takes matrices only; give the other parameters to another optimizer")

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, members in shapes.items():
                moving = []
                for p in members:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    moving.append(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(members, orthogonalise(torch.stack(moving)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"] * scale)
