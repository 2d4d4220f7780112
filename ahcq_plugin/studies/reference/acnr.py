# SPDX-License-Identifier: Apache-2.0
"""ACNR as it is defined, step by step: two SVDs and all error rows in every step. And matrices to try it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step(weight: Tensor, errors: Sequence[Tensor], lam: float, beta: float, energy: float) -> Tensor:
    """One step on ``weight`` (out, in) with the error rows dX, chunks of (rows, in); in the weight's dtype."""
    a = weight.T
    u, _, _ = torch.linalg.svd(a, full_matrices=False)
    e = torch.zeros(u.shape[1], dtype=u.dtype)
    for chunk in errors:
        e += (chunk @ u).square().sum(0)
    e /= sum(len(chunk) for chunk in errors)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    candidate = (s + 2 * lam * s.mean()) / (1 + 2 * lam + 2 * beta * e)
    exceeds = torch.nonzero(s.square().cumsum(0) > energy * s.square().sum()).flatten().tolist()
    c = exceeds[0] if exceeds else len(s) - 1
    index = torch.arange(len(s))
    new = torch.where(index <= c, s, torch.maximum(s, candidate))
    return (u @ torch.diag(new) @ vh).T


def reduce_step_by_step(
    weight: Tensor, errors: Sequence[Tensor], lam=0.003, beta=0.001, energy=0.8, steps=200
) -> Tensor:
    """``weight`` after all steps."""
    for _ in range(steps):
        weight = step(weight, errors, lam, beta, energy)
    return weight


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal values in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ill_weight(out: int, inputs: int, condition: float = 1e4, seed: int = 0) -> Tensor:
    """float64 weight whose singular values fall geometrically from 3 to 3 / condition."""
    rank = min(out, inputs)
    values = 3 * condition ** -(torch.arange(rank, dtype=torch.float64) / max(rank - 1, 1))
    left = torch.linalg.qr(randn(out, rank, seed=seed))[0]
    right = torch.linalg.qr(randn(inputs, rank, seed=seed + 1))[0]
    return left * values @ right.T


def error_rows(inputs: int, scale: float, seed: int = 0) -> list[Tensor]:
    """Error rows in two chunks, of very different size from channel to channel."""
    spread = torch.logspace(-1, 1, inputs, dtype=torch.float64)
    return [scale * spread * randn(rows, inputs, seed=seed + rows) for rows in (37, 20)]


def gram_of(rows: list[Tensor]) -> Tensor:
    """Mean outer product (in, in) of error rows (rows, in)."""
    rows = torch.cat(rows)
    return rows.T @ rows / len(rows)
