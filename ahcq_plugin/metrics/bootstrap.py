# SPDX-License-Identifier: Apache-2.0
"""How much a mean over objects could differ had other images been measured: bootstrap over images.

Objects of one image rise and fall together, so images are drawn with replacement, each with all its objects (a cluster
bootstrap), and the mean over the objects drawn is taken. Limits are percentiles of that mean (Efron and Tibshirani,
1993, section 13.3). Two methods are compared on the same images by the differences of their objects: what is common to
both, how hard an image is, drops out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over all objects and the limits that hold the stated share of the resampled means."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside: of a difference, that it is not chance at that level."""
        return self.low > 0 or self.high < 0

    def text(self, form: str = "{:.3f}") -> str:
        """As in ``0.812 [0.790, 0.833]``."""
        return f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"


def bootstrap_mean(
    groups: Sequence[Sequence[float]], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over the values of all groups, with limits by resampling groups.

    Args:
        groups: values of each image's objects; an image without objects counts for nothing.
        level: share of the resampled means between the limits, in (0, 1).
        resamples: how often; ``seed``: of the draws, so that equal arguments give equal limits.
    Raises:
        ValueError: no values, values that are not finite, a level out of range, no resamples.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"`level` must be in (0, 1) and `resamples` at least 1, got {level!r} and {resamples!r}")
    kept = [np.asarray(group, np.float64) for group in groups if len(group)]
    if not kept or not all(np.isfinite(group).all() for group in kept):
        raise ValueError(f"`groups` must hold finite values, got {len(kept)} groups with values")
    sums, counts = np.array([group.sum() for group in kept]), np.array([len(group) for group in kept])
    # how often each group is drawn is all that the mean depends on
    drawn = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=resamples)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def bootstrap_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``first`` minus ``second``, object by object of the same images, as ``bootstrap_mean``.

    Raises: ValueError: they are not of the same objects.
    """
    if [len(group) for group in first] != [len(group) for group in second]:
        raise ValueError("a paired difference needs the same objects of the same images on both sides")
    return bootstrap_mean([np.subtract(a, b) for a, b in zip(first, second, strict=True)], level, resamples, seed)
