# SPDX-License-Identifier: Apache-2.0
"""The range search that ours is measured against: every candidate on all the data, one candidate after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ahcq_plugin.functional.uniform import qparams_from_range


def candidates(x: Tensor, bits: int, steps: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """lo, hi (C,) of each of the steps * 2^bits candidates, widths ascending, from x (C, N) in float32."""
    qmax = 2**bits - 1
    x = x.float()
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    for i in range(1, steps + 1):
        width = span * i / steps
        step = width / qmax
        for zero in range(qmax + 1):
            yield -zero * step, width - zero * step


def mean_error(x: Tensor, lo: Tensor, hi: Tensor, bits: int, p: float) -> Tensor:
    """Mean |x_hat - x|^p per row, in x's dtype, written as in the definition."""
    params = qparams_from_range(lo, hi, bits)
    scale, zero = params.scale.to(x.dtype)[:, None], params.zero_point.to(x.dtype)[:, None]
    codes = torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale - x).abs().pow(p).mean(1)


def search_one_by_one(
    x: Tensor, bits: int, p: float = 2.4, steps: int = 100, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """lo, hi (C,) of the best candidate, errors in x's dtype; ``first``: of the first so many only (to time them)."""
    best = torch.full((x.shape[0],), torch.inf, dtype=x.dtype, device=x.device)
    best_lo, best_hi = torch.zeros_like(best, dtype=torch.float32), torch.zeros_like(best, dtype=torch.float32)
    for count, (lo, hi) in enumerate(candidates(x, bits, steps)):
        if count == first:
            break
        error = mean_error(x, lo, hi, bits, p)
        better = error < best
        best = torch.where(better, error, best)
        best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
    return best_lo, best_hi
