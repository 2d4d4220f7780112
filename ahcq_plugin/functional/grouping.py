# SPDX-License-Identifier: Apache-2.0
"""Group channels that can share one uniform quantizer (Channel-Aware Grouping, AHCQ-SAM, Section 3.2.3).

The paper clusters (scale, zero point) pairs as points of a plane. Here the groups are those of least error. A channel
is known by ``POINTS`` of its values, x_p with the share w_p: a mean minimum, 13 quantiles, a mean maximum. Quantized in
[lo, hi] with the step s it has the mean squared error

    min(s^2 / 12, sum_p w_p x_p^2) + sum_p w_p (max(x_p - hi, 0)^2 + max(lo - x_p, 0)^2)

for rounding (or everything rounded to zero) and for what is clipped. Channels weigh by their importance.

All is computed on the CPU, whatever device the points are on: many small steps that depend on each other's values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahcq_plugin.functional.uniform import SCALE_EPS, UniformParams, check_bits

POINTS = 15
_NORMAL = torch.linspace(-3, 3, POINTS - 2, dtype=torch.float64)  # the quantiles lie evenly on a normal distribution
LEVELS = torch.special.ndtr(_NORMAL)
_EDGES = torch.special.ndtr((_NORMAL[1:] + _NORMAL[:-1]) / 2)
_END = torch.tensor([0.005], dtype=torch.float64)  # more than seen: unseen items go further; 0.002 and 0.02 do as well
SHARES = torch.cat([_END, torch.cat([0 * _END, _EDGES, 0 * _END + 1]).diff(), _END]) / (1 + 2 * _END)

SPARE = 2  # groups are first made for this many times the count, then the least useful ones are dissolved
PASSES = 10  # assignments after each change of the number of groups; they converge in 2 to 6
ZOOMS = 4  # grids of the search for a range, each four times finer than the one before
STEPS = torch.linspace(-1, 1, 9, dtype=torch.float64)  # of such a grid, along either end of the range
FACTORS = torch.linspace(0.94, 1.08, 15, dtype=torch.float64)  # of the scale found, tried with integer zero points
TINY_WEIGHT = 1e-6  # of the mean: channels that nothing reads still belong somewhere


def describe_channels(sample: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The points (n, POINTS) float32, ascending, of channels with the values ``sample`` (rows >= 1, n).

    Args:
        lo, hi: (n,) mean minimum and maximum over calibration items.
    """
    rows = (LEVELS * (len(sample) - 1)).round().long().to(sample.device)
    quantiles = sample.float().sort(0).values[rows]
    return torch.cat([lo.float()[None], quantiles, hi.float()[None]]).sort(0).values.T.contiguous()


def fit(points: Tensor, bits: int) -> UniformParams:
    """The quantizer of least error for each channel.

    Args:
        points: (n, POINTS) from ``describe_channels``.
        bits: 2..16.
    Returns:
        float32 scale (n,) and int32 zero point (n,).
    """
    channels = points.detach().cpu().double()
    _check(channels, torch.ones(len(points)), 1)
    scale, zero_point = _Channels(channels, torch.ones_like(channels[:, 0]), bits).fit_alone()
    return _on(points.device, scale, zero_point)


def cluster(points: Tensor, weights: Tensor, count: int, bits: int) -> tuple[Tensor, UniformParams]:
    """At most ``count`` shared quantizers for n channels, and who shares which.

    Groups are added one at a time, each for the channel that loses most by sharing; the surplus is then dissolved, the
    group that is missed least first; after each change ranges and members are improved in turn. Deterministic, and
    independent of the order of the channels.

    Args:
        points: (n, POINTS) from ``describe_channels``.
        weights: (n,) importance, >= 0.
        count: at least 1.
        bits: 2..16.
    Returns:
        labels int64 (n,) in [0, k) and ``UniformParams`` with float32 scale (k,) and int32 zero point (k,), ordered by
        scale; k = count, less where fewer channels differ. No group is empty, equal channels share one.
    """
    weights, channels = weights.detach().cpu().double(), points.detach().cpu().double()
    _check(channels, weights, count)
    unique, to_unique = channels.unique(dim=0, return_inverse=True)
    w = torch.zeros(len(unique), dtype=torch.float64).index_put_((to_unique,), weights, accumulate=True)
    w = (w / w.mean().clamp(min=1e-300)).clamp(min=TINY_WEIGHT)
    labels, scale, zero_point = _Grouping(_Channels(unique, w, bits)).grow(count)
    order = scale.argsort(stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    return rank[labels][to_unique].to(points.device), _on(points.device, scale[order], zero_point[order])


def _on(device: torch.device, scale: Tensor, zero_point: Tensor) -> UniformParams:
    return UniformParams(scale.float().to(device), zero_point.to(torch.int32).to(device))


def _check(points: Tensor, weights: Tensor, count: int) -> None:
    if points.ndim != 2 or points.shape[1] != POINTS or not len(points) or weights.shape != points.shape[:1]:
        raise ValueError(
            f"`points` must be (n, {POINTS}) and `weights` (n,) with n >= 1, got {tuple(points.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`count` must be an integer of at least 1, got {count!r}")
    if not bool(points.isfinite().all()):
        raise ValueError("`points` must be finite: look for NaN or overflow in the floating-point model")
    if not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError("`weights` must be finite and not negative: look for NaN in the weights of the next layer")


class _Excess:
    """sum_p w_p max(x_p - t, 0)^2 of every channel, from sums over the points beyond t."""

    def __init__(self, points: Tensor):
        terms = torch.stack([SHARES.expand_as(points), SHARES * points, SHARES * points**2])  # shares are symmetric
        self.points = points
        self.sums = torch.nn.functional.pad(terms.flip(2).cumsum(2).flip(2), (0, 1))

    def __call__(self, t: Tensor, chosen: Tensor) -> Tensor:
        """For thresholds t (c, m) of the channels ``chosen`` (c,)."""
        beyond = torch.searchsorted(self.points[chosen], t.contiguous(), right=True)
        share, mean, square = self.sums[:, chosen].gather(2, beyond.expand(3, -1, -1))
        return (square - 2 * t * mean + t**2 * share).clamp_(min=0)


class _Channels:
    """The channels: points (n, POINTS) ascending and weights (n,), float64."""

    def __init__(self, points: Tensor, weights: Tensor, bits: int):
        self.qmax = 2 ** check_bits(bits) - 1
        self.points, self.weights = points, weights
        self.square = (points**2 @ SHARES)[:, None]
        self.above, self.below = _Excess(points), _Excess(-points.flip(1))
        self.all = torch.arange(len(points))

    def rounding(self, step: Tensor, chosen: Tensor) -> Tensor:
        """Weighted rounding error of channels ``chosen`` (c,) with steps (c, m)."""
        return torch.minimum(step**2 / 12, self.square[chosen]) * self.weights[chosen, None]

    def clipping(self, lo: Tensor, hi: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted clipping error below lo (c, m) and above hi (c, m)."""
        weights = self.weights[chosen, None]
        return self.below(-lo, chosen) * weights, self.above(hi, chosen) * weights

    def errors(self, scale: Tensor, zero_point: Tensor, chosen: Tensor) -> Tensor:
        """Weighted error of channels ``chosen`` (c,) with quantizers (c, m)."""
        below, above = self.clipping(-zero_point * scale, (self.qmax - zero_point) * scale, chosen)
        return self.rounding(scale, chosen) + below + above

    def fit_alone(self) -> tuple[Tensor, Tensor]:
        """The quantizers (scale, zero point), each (n,), of least error for every channel alone."""
        return self.fit(self.all, self.all)

    def fit(self, chosen: Tensor, group: Tensor, *rivals: Tensor) -> tuple[Tensor, Tensor]:
        """The quantizers (scale, zero point), each (g,), of least summed error.

        Args:
            chosen: (c,) channels.
            group: (c,) the group in [0, g) of each of them, none empty.
            rivals: scale (g,) and zero point (g,) that win unless better ones are found.
        """
        groups = int(group.max()) + 1
        members = torch.zeros(groups, len(group), dtype=torch.float64)
        members.scatter_(0, group[None], 1.0)  # sums by a product, in one order
        # The error is convex in (lo, hi) but for the cap on rounding: a grid, then finer ones around its best point.
        nothing = torch.zeros(groups, dtype=torch.float64)
        lo = reach_lo = nothing.scatter_reduce(0, group, self.points[chosen, 0], "amin") / 2
        hi = reach_hi = nothing.scatter_reduce(0, group, self.points[chosen, -1], "amax") / 2
        for _ in range(ZOOMS):
            los = (lo[:, None] + reach_lo[:, None] * STEPS).clamp(max=0)
            his = (hi[:, None] + reach_hi[:, None] * STEPS).clamp(min=0)
            below, above = (members @ clipped for clipped in self.clipping(los[group], his[group], chosen))
            steps = ((his[:, None] - los[:, :, None]) / self.qmax).flatten(1)
            rounding = members @ self.rounding(steps[group], chosen)
            best = rounding + (below[:, :, None] + above[:, None]).flatten(1)
            best = best.argmin(1, keepdim=True)
            lo, hi = los.gather(1, best // len(STEPS))[:, 0], his.gather(1, best % len(STEPS))[:, 0]
            reach_lo, reach_hi = reach_lo / 4, reach_hi / 4
        # Both neighbouring zero points with steps around the one found.
        step = ((hi - lo) / self.qmax).clamp(min=SCALE_EPS)
        zeros = (-lo / step).floor()[:, None] + torch.arange(2).repeat_interleave(len(FACTORS))
        scales = (step[:, None] * FACTORS).clamp(min=SCALE_EPS).float().double().repeat(1, 2)
        tried = [scales, zeros.clamp(0, self.qmax)]
        if rivals:
            tried = [torch.cat([rival[:, None], new], 1) for rival, new in zip(rivals, tried, strict=True)]
        best = (members @ self.errors(*(new[group] for new in tried), chosen)).argmin(1, keepdim=True)
        return tried[0].gather(1, best)[:, 0], tried[1].gather(1, best)[:, 0]


class _Grouping:
    """Labels (n,) and quantizers (g,) of the groups, improved in turn."""

    def __init__(self, channels: _Channels):
        self.channels = channels
        self.alone = channels.fit_alone()
        self.alone_error = channels.errors(*(t[:, None] for t in self.alone), channels.all)[:, 0]
        self.labels = torch.zeros_like(channels.all)
        self.scale, self.zero_point = channels.fit(channels.all, self.labels)

    def grow(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, scale, zero_point) of at most ``count`` groups."""
        while len(self.scale) < min(SPARE * count, len(self.labels)):
            self._split()
            self._improve()
        while len(self.scale) > count:
            self._dissolve()
            self._improve()
        single = torch.bincount(self.labels)[self.labels] == 1
        self.scale[self.labels[single]], self.zero_point[self.labels[single]] = (t[single] for t in self.alone)
        return self.labels, self.scale, self.zero_point

    def _errors(self) -> tuple[Tensor, Tensor]:
        """Error of every channel in every group (n, g), and in its own group (n,)."""
        shape = len(self.labels), -1
        errors = self.channels.errors(self.scale.expand(shape), self.zero_point.expand(shape), self.channels.all)
        return errors, errors.gather(1, self.labels[:, None])[:, 0]

    def _split(self) -> None:
        """A group of its own for the channel that loses most by sharing."""
        loss = self._errors()[1] - self.alone_error
        loss[torch.bincount(self.labels)[self.labels] == 1] = -torch.inf
        seed = loss.argmax()
        changed = torch.arange(len(self.scale) + 1) == self.labels[seed]
        self.labels[seed] = len(self.scale)
        self.scale = torch.cat([self.scale, self.alone[0][seed, None]])
        self.zero_point = torch.cat([self.zero_point, self.alone[1][seed, None]])
        self._fit(changed)

    def _dissolve(self) -> None:
        """Members of the group whose end costs least go to their second choices."""
        errors, own = self._errors()
        elsewhere, second = errors.scatter(1, self.labels[:, None], torch.inf).min(1)
        cost = torch.zeros_like(self.scale).index_put_((self.labels,), elsewhere - own, accumulate=True)
        gone = cost.argmin()
        changed = torch.zeros_like(self.scale, dtype=torch.bool)
        changed[second[self.labels == gone]] = True
        keep = torch.ones_like(changed)
        keep[gone] = False
        self.labels = (keep.cumsum(0) - 1)[torch.where(self.labels == gone, second, self.labels)]
        self.scale, self.zero_point = self.scale[keep], self.zero_point[keep]
        self._fit(changed[keep])

    def _improve(self) -> None:
        """Every channel to the group of least error, then new quantizers for the groups that changed; repeated."""
        for _ in range(PASSES):
            errors, own = self._errors()
            best, labels = errors.min(1)
            labels = torch.where(own <= best, self.labels, labels)
            # A group that would become empty keeps the member that loses least by staying; that may empty another one.
            while len(empty := (torch.bincount(labels, minlength=len(self.scale)) == 0).nonzero()):
                members = (self.labels == empty[0]).nonzero()[:, 0]
                labels[members[(own[members] - best[members]).argmin()]] = empty[0]
            moved = labels != self.labels
            if not bool(moved.any()):
                break
            changed = torch.zeros_like(self.scale, dtype=torch.bool)
            changed[labels[moved]] = True
            changed[self.labels[moved]] = True
            self.labels = labels
            self._fit(changed)

    def _fit(self, changed: Tensor) -> None:
        """New quantizers for the changed groups."""
        chosen = changed[self.labels].nonzero()[:, 0]
        group = (changed.cumsum(0) - 1)[self.labels[chosen]]
        fitted = self.channels.fit(chosen, group, self.scale[changed], self.zero_point[changed])
        self.scale[changed], self.zero_point[changed] = fitted
