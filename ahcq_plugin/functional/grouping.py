# SPDX-License-Identifier: Apache-2.0
"""Group channels that can share one uniform quantizer (Channel-Aware Grouping, AHCQ-SAM, Section 3.2.3).

The paper clusters (scale, zero point) pairs as points of a plane. Here the groups are those of least error. A channel
whose quantizer has the range [lo, hi] and the step s is modelled as values spread evenly over [lo - m, hi + m]. With a
range [L, H] and a step S that it shares, its mean squared error is

    min(S^2 / 12, mean square of the values) + (max(L - lo + m, 0)^3 + max(hi + m - H, 0)^3) / (3 (hi - lo + 2 m))

for rounding (or everything rounded to zero) and for what is clipped at either end. The margin m makes a channel's own
range the best one for it: m = s (1 + sqrt(1 + 6 qmax^2)) / (6 qmax), 0.4 steps. Channels weigh by their importance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ahcq_plugin.functional.uniform import SCALE_EPS, UniformParams, check_bits

SPARE = 2  # groups are first made for this many times the count, then the least useful ones are dissolved
PASSES = 10  # assignments after each change of the number of groups; they converge in 2 to 6
ZOOMS = 4  # grids of the search for a range, each four times finer than the one before
STEPS = torch.linspace(-1, 1, 9, dtype=torch.float64)  # of such a grid, along either end of the range
FACTORS = torch.linspace(0.94, 1.08, 15, dtype=torch.float64)  # of the scale found, tried with integer zero points
TINY_WEIGHT = 1e-6  # of the mean: channels that nothing reads still belong somewhere


def cluster(params: UniformParams, weights: Tensor, count: int, bits: int) -> tuple[Tensor, UniformParams]:
    """At most ``count`` shared quantizers for the quantizers ``params``, and who shares which.

    Groups are added one at a time, each for the channel that loses most by sharing; the surplus is then dissolved, the
    group that is missed least first; after each change ranges and members are improved in turn. Deterministic, and
    independent of the order of the quantizers.

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
        """(labels, scale, zero_point) of ``count`` groups, none empty."""
        self._fit(torch.ones(1, dtype=torch.bool, device=self.labels.device))
        while len(self.scale) < min(SPARE * count, len(self.labels)):
            self._split()
            self._improve()
        while len(self.scale) > count:
            self._dissolve()
            self._improve()
        # A channel alone has its own quantizer, to the last bit.
        alone = torch.bincount(self.labels)[self.labels] == 1
        self.scale[self.labels[alone]] = self.channels.scale[alone]
        self.zero_point[self.labels[alone]] = self.channels.zero_point[alone]
        return self.labels, self.scale, self.zero_point

    def _improve(self) -> None:
        for _ in range(PASSES):
            if not self._assign_and_fit():
                break

    def _errors(self) -> tuple[Tensor, Tensor]:
        """Error of every channel in every group (n, groups), and in its own group (n,)."""
        errors = self.channels.grid_errors(self.scale, self.zero_point)
        return errors, errors.gather(1, self.labels[:, None])[:, 0]

    def _split(self) -> None:
        """A group of its own for the channel that loses most by sharing."""
        channels = self.channels
        alone = channels.grid_errors(channels.scale[:, None], channels.zero_point[:, None])[:, 0]
        loss = self._errors()[1] - alone
        loss[torch.bincount(self.labels)[self.labels] == 1] = -torch.inf
        seed = int(loss.argmax())
        self.labels[seed] = len(self.scale)
        self.scale = torch.cat([self.scale, channels.scale[seed : seed + 1]])
        self.zero_point = torch.cat([self.zero_point, channels.zero_point[seed : seed + 1]])

    def _dissolve(self) -> None:
        """Members of the group whose end costs least go to their second choices."""
        errors, own = self._errors()
        elsewhere, second = errors.scatter(1, self.labels[:, None], torch.inf).min(1)
        cost = torch.zeros_like(self.scale).index_put_((self.labels,), elsewhere - own, accumulate=True)
        gone = int(cost.argmin())
        members = self.labels == gone
        self.labels = torch.where(members, second, self.labels)
        changed = torch.zeros(len(self.scale), dtype=torch.bool, device=self.labels.device)
        changed[second[members]] = True
        keep = torch.arange(len(self.scale), device=self.labels.device) != gone
        self.labels = (keep.cumsum(0) - 1)[self.labels]
        self.scale, self.zero_point = self.scale[keep], self.zero_point[keep]
        self._fit(changed[keep])

    def _assign_and_fit(self) -> bool:
        """Every channel to the group of least error, then new ranges for the groups that changed; False: none did."""
        errors, own = self._errors()
        best, labels = errors.min(1)
        labels = torch.where(own <= best, self.labels, labels)
        # A group that would become empty keeps the member that loses least by staying; that may empty another one.
        while len(empty := (torch.bincount(labels, minlength=len(self.scale)) == 0).nonzero()):
            members = (self.labels == empty[0]).nonzero()[:, 0]
            labels[members[(own[members] - best[members]).argmin()]] = empty[0]
        moved = labels != self.labels
        changed = torch.zeros(len(self.scale), dtype=torch.bool, device=labels.device)
        changed[labels[moved]] = True
        changed[self.labels[moved]] = True
        self.labels = labels
        self._fit(changed)
        return bool(moved.any())

    def _fit(self, changed: Tensor) -> None:
        """New quantizers for the changed groups: the range of least summed error, with an integer zero point."""
        if not bool(changed.any()):
            return
        channels, qmax = self.channels, self.channels.qmax
        chosen = changed[self.labels].nonzero()[:, 0]
        rank = changed.cumsum(0) - 1
        group = rank[self.labels[chosen]]
        groups = int(changed.sum())
        nothing = torch.zeros(groups, dtype=torch.float64, device=group.device)
        members = torch.zeros(groups, len(group), dtype=torch.float64, device=group.device)
        members.scatter_(0, group[None], 1.0)  # summing by a product is deterministic on every device
        # The error is convex in (lo, hi) but for the cap on rounding: a grid, then finer ones around its best point.
        lo = reach_lo = nothing.scatter_reduce(0, group, channels.lo[chosen], "amin") / 2
        hi = reach_hi = nothing.scatter_reduce(0, group, channels.hi[chosen], "amax") / 2
        rows = torch.arange(groups, device=group.device)
        for _ in range(ZOOMS):
            los = (lo[:, None] + reach_lo[:, None] * STEPS.to(group.device)).clamp(max=0).repeat_interleave(9, dim=1)
            his = (hi[:, None] + reach_hi[:, None] * STEPS.to(group.device)).clamp(min=0).repeat(1, 9)
            best = (members @ channels.errors(los[group], his[group], chosen)).argmin(1)
            lo, hi, reach_lo, reach_hi = los[rows, best], his[rows, best], reach_lo / 4, reach_hi / 4
        # Both neighbouring zero points with steps around the one found, and the quantizer as it was.
        scale = ((hi - lo) / qmax).clamp(min=SCALE_EPS)
        zeros = (-lo / scale).floor()[:, None] + torch.arange(2, device=group.device).repeat_interleave(len(FACTORS))
        zeros = torch.cat([self.zero_point[changed, None], zeros.clamp(0, qmax)], 1)
        scales = (scale[:, None] * FACTORS.to(group.device)).float().double().repeat(1, 2)
        scales = torch.cat([self.scale[changed, None], scales], 1)
        best = (members @ channels.grid_errors(scales[group], zeros[group], chosen)).argmin(1)
        self.scale[changed], self.zero_point[changed] = scales[rows, best], zeros[rows, best]
