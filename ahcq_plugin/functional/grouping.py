# SPDX-License-Identifier: Apache-2.0
"""Group channels that can share one uniform quantizer (Channel-Aware Grouping, AHCQ-SAM, Section 3.2.3).

The paper clusters (scale, zero point) pairs as points of a plane. Here the clusters minimise the error that sharing
causes. A channel with quantizer range [lo, hi] and step s = (hi - lo) / qmax is modelled as values spread evenly over
[lo - m, hi + m]. Under a shared range [L, H] with step S it has the mean squared error

    error(L, H) = min(S^2 / 12, mean square of the channel) + ((H - hi - m)_-^3 + (lo - m - L)_-^3) / (3 (hi - lo + 2 m))

(rounding, or everything rounded to zero, and what is clipped at either end; t_- = max(-t, 0)). The margin is chosen so
that a channel alone is served best by its own range: m = s (1 + sqrt(1 + 6 qmax^2)) / (6 qmax). Channels weigh by their
importance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ahcq_plugin.functional.uniform import SCALE_EPS, UniformParams, check_bits

PASSES = 10  # assignments per number of groups; they converge in 2 to 6
ZOOMS = 6  # refinements of the search for a range, each four times finer than the one before
TINY_WEIGHT = 1e-6  # of the mean: channels that nothing reads still belong somewhere


def cluster(params: UniformParams, weights: Tensor, count: int, bits: int) -> tuple[Tensor, UniformParams]:
    """At most ``count`` shared quantizers for the quantizers ``params``, and who shares which.

    Groups are added one at a time, each started at the range that now causes the largest error; then ranges and
    members are improved in turn. No step raises the modelled error, so more groups never model worse. Deterministic.

    Args:
        params: n quantizers, ``scale`` (n,) > 0 and ``zero_point`` (n,) in [0, 2^bits - 1].
        weights: (n,) importance, >= 0.
        count: at least 1.
        bits: 2..16.
    Returns:
        labels int64 (n,) in [0, k) and ``UniformParams`` with float32 scale (k,) and int32 zero point (k,), ordered by
        scale; k = min(count, number of different quantizers). Equal quantizers share a group; a group of equals keeps
        their parameters bit for bit.
    """
    qmax = 2 ** check_bits(bits) - 1
    _check(params, weights, count)
    pairs = torch.stack([params.scale.detach().double(), params.zero_point.double()], 1)
    unique, to_unique = pairs.unique(dim=0, return_inverse=True)
    w = torch.zeros(len(unique), dtype=torch.float64, device=pairs.device)
    w = w.index_put_((to_unique,), weights.detach().double(), accumulate=True)
    w = (w / w.mean().clamp(min=1e-300)).clamp(min=TINY_WEIGHT)
    channels = _Channels(unique[:, 0], unique[:, 1], w, qmax)
    labels, scale, zero_point = _Grouping(channels).grow(min(count, len(unique)))
    order = scale.argsort(stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return rank[labels][to_unique], UniformParams(scale[order].float(), zero_point[order].to(torch.int32))


def _check(params: UniformParams, weights: Tensor, count: int) -> None:
    n = params.scale.numel()
    if params.scale.ndim != 1 or not n or weights.shape != params.scale.shape:
        raise ValueError(
            f"`params` and `weights` must be (n,) with n >= 1, got {tuple(params.scale.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`count` must be an integer of at least 1, got {count!r}")
    if not bool((params.scale > 0).all() & params.scale.isfinite().all()):
        raise ValueError("`scale` must be positive and finite; calibrate on data without NaN and infinity")
    if not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError("`weights` must be finite and not negative; look for NaN in the weights of the next layer")


class _Channels:
    """The modelled channels; float64 columns (n, 1)."""

    def __init__(self, scale: Tensor, zero_point: Tensor, weights: Tensor, qmax: int):
        margin = scale * (1 + math.sqrt(1 + 6 * qmax**2)) / (6 * qmax)
        self.scale, self.zero_point, self.weights, self.qmax = scale, zero_point, weights, qmax
        self.lo, self.hi = -zero_point * scale, (qmax - zero_point) * scale
        self.first, self.last = (self.lo - margin)[:, None], (self.hi + margin)[:, None]
        self.width = self.last - self.first
        self.square = (self.first**2 + self.first * self.last + self.last**2) / 3

    def errors(self, lo: Tensor, hi: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Weighted error of the chosen channels (c,) under the ranges, (m,) or one row for each channel (c, m)."""
        rounding = torch.minimum(((hi - lo) / self.qmax) ** 2 / 12, self.square[chosen])
        below, above = (lo - self.first[chosen]).clamp_(min=0), (self.last[chosen] - hi).clamp_(min=0)
        clipping = (below**3 + above**3) / (3 * self.width[chosen])
        return (rounding + clipping) * self.weights[chosen, None]

    def grid_errors(self, scale: Tensor, zero_point: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The same for quantizers instead of ranges."""
        return self.errors(-zero_point * scale, (self.qmax - zero_point) * scale, chosen)


class _Grouping:
    """Labels and group quantizers, improved in turn."""

    def __init__(self, channels: _Channels):
        self.channels = channels
        self.labels = torch.zeros(len(channels.weights), dtype=torch.int64, device=channels.weights.device)
        self.scale, self.zero_point = channels.scale[:1].clone(), channels.zero_point[:1].clone()

    def grow(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, scale, zero_point) with ``count`` groups, none empty."""
        self._fit(torch.ones(1, dtype=torch.bool, device=self.labels.device))
        while len(self.scale) < count:
            self._split()
            for _ in range(PASSES):
                if not self._assign_and_fit():
                    break
        return self.labels, self.scale, self.zero_point

    def _split(self) -> None:
        """A group of its own for the channel that loses most by sharing; the first of equals."""
        channels = self.channels
        shared = channels.grid_errors(self.scale[self.labels, None], self.zero_point[self.labels, None])
        alone = channels.grid_errors(channels.scale[:, None], channels.zero_point[:, None])
        # A group of one stays: its channel is never the seed of another group.
        several = torch.bincount(self.labels)[self.labels] > 1
        seed = int(torch.where(several, (shared - alone)[:, 0], -torch.inf).argmax())
        self.labels[seed] = len(self.scale)
        self.scale = torch.cat([self.scale, channels.scale[seed : seed + 1]])
        self.zero_point = torch.cat([self.zero_point, channels.zero_point[seed : seed + 1]])

    def _assign_and_fit(self) -> bool:
        """Every channel to the group of least error, then new ranges for the groups that changed; False: none did."""
        errors = self.channels.grid_errors(self.scale, self.zero_point)
        best, labels = errors.min(1)
        stay = errors.gather(1, self.labels[:, None])[:, 0] <= best
        labels = torch.where(stay, self.labels, labels)
        # A group that would become empty keeps the member that loses least by staying.
        for group in (torch.bincount(labels, minlength=len(self.scale)) == 0).nonzero()[:, 0].tolist():
            members = (self.labels == group).nonzero()[:, 0]
            labels[members[(errors[members, group] - best[members]).argmin()]] = group
        moved = labels != self.labels
        changed = torch.zeros(len(self.scale), dtype=torch.bool, device=labels.device)
        changed[labels[moved]] = True
        changed[self.labels[moved]] = True
        self.labels = labels
        self._fit(changed)
        return bool(moved.any())

    def _fit(self, changed: Tensor) -> None:
        """The range of least summed error for each changed group, on a grid with an integer zero point."""
        if not bool(changed.any()):
            return
        channels, qmax = self.channels, self.channels.qmax
        chosen = changed[self.labels].nonzero()[:, 0]
        rank = changed.cumsum(0) - 1
        group = rank[self.labels[chosen]]

        def total(errors: Tensor) -> Tensor:
            sums = torch.zeros(int(changed.sum()), errors.shape[1], dtype=errors.dtype, device=errors.device)
            return sums.index_put_((group,), errors, accumulate=True)

        lo = torch.zeros(int(changed.sum()), dtype=torch.float64, device=group.device)
        hi = lo.scatter_reduce(0, group, channels.hi[chosen], "amax") / 2
        lo = lo.scatter_reduce(0, group, channels.lo[chosen], "amin") / 2
        # The error is convex in (lo, hi) but for the cap on rounding: a grid, then finer ones around its best point.
        reach_lo, reach_hi = lo.abs(), hi.abs()
        steps = torch.linspace(-1, 1, 9, dtype=torch.float64, device=group.device)
        rows = torch.arange(len(lo), device=group.device)
        for _ in range(ZOOMS):
            los = (lo[:, None] + reach_lo[:, None] * steps).clamp(max=0).repeat_interleave(9, dim=1)
            his = (hi[:, None] + reach_hi[:, None] * steps).clamp(min=0).repeat(1, 9)
            best = total(channels.errors(los[group], his[group], chosen)).argmin(1)
            lo, hi = los[rows, best], his[rows, best]
            reach_lo, reach_hi = reach_lo / 4, reach_hi / 4
        scale = ((hi - lo) / qmax).clamp(min=SCALE_EPS)
        # Both neighbouring zero points with steps around the one found, and the group's quantizer as it was.
        factors = torch.linspace(0.94, 1.08, 15, dtype=torch.float64, device=group.device)
        floor = (-lo / scale).floor().clamp(0, qmax)
        zeros = torch.stack([floor, (floor + 1).clamp(max=qmax)], 1).repeat_interleave(15, dim=1)
        scales = (scale[:, None] * factors).float().double().repeat(1, 2)
        zeros = torch.cat([self.zero_point[changed, None], zeros], 1)
        scales = torch.cat([self.scale[changed, None], scales], 1)
        best = total(channels.grid_errors(scales[group], zeros[group], chosen)).argmin(1)
        self.scale[changed], self.zero_point[changed] = scales[rows, best], zeros[rows, best]
