# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.metrics.bootstrap import bootstrap_difference, bootstrap_mean

GROUPS = [[0.1, 0.9, 0.5], [0.7], [0.2, 0.3], [1.0, 0.8, 0.9, 0.95]]


def all_means(groups) -> np.ndarray:
    """The mean of each of the n^n equally likely resamples."""
    drawn = itertools.product(groups, repeat=len(groups))
    return np.sort([np.mean(np.concatenate(resample)) for resample in drawn])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_limits_are_quantiles_of_all_resamples(level: float) -> None:
    exact = all_means(GROUPS)
    found = bootstrap_mean(GROUPS, level, resamples=200_000)
    assert found.mean == pytest.approx(np.mean(np.concatenate(GROUPS)))
    for limit, share in ((found.low, (1 - level) / 2), (found.high, (1 + level) / 2)):
        below, upto = np.mean(exact < limit - 1e-9), np.mean(exact <= limit + 1e-9)
        assert below - 0.01 <= share <= upto + 0.01


def test_width_is_that_of_a_normal_distribution_for_many_images() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.2, 400)
    found = bootstrap_mean([[value] for value in values])
    expected = 1.959964 * values.std() / math.sqrt(len(values))
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.05)


def test_objects_of_one_image_are_drawn_together() -> None:
    """Ten equal objects an image say no more than one: the limits must not shrink."""
    values = np.random.default_rng(2).uniform(size=30)
    once, often = (bootstrap_mean([[value] * copies for value in values]) for copies in (1, 10))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_a_small_but_steady_difference_is_seen_in_pairs_only() -> None:
    generator = np.random.default_rng(3)
    hard = generator.uniform(0.2, 0.9, (40, 3))
    better = hard + generator.normal(0.01, 0.005, hard.shape)
    assert bootstrap_difference(better, hard).excludes_zero
    assert bootstrap_mean(better).low < bootstrap_mean(hard).mean < bootstrap_mean(better).high
    assert not bootstrap_difference(hard, hard + generator.permutation([0.1, -0.1] * 60).reshape(40, 3)).excludes_zero


@given(
    groups=st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=6).filter(any), seed=st.integers(0, 99)
)
def test_limits_lie_within_the_values_and_follow_from_the_seed(groups, seed: int) -> None:
    found = bootstrap_mean(groups, resamples=50, seed=seed)
    means = [np.mean(group) for group in groups if group]
    assert min(means) - 1e-9 <= found.low <= found.high <= max(means) + 1e-9
    assert found == bootstrap_mean(groups, resamples=50, seed=seed)


@pytest.mark.parametrize(
    ("groups", "options"),
    [([], {}), ([[]], {}), ([[float("nan")]], {}), ([[1.0]], {"level": 1.0}), ([[1.0]], {"resamples": 0})],
)
def test_what_cannot_be_resampled_is_refused(groups, options: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        bootstrap_mean(groups, **options)


def test_pairs_need_the_same_objects() -> None:
    with pytest.raises(ValueError, match="same objects"):
        bootstrap_difference([[1.0], [0.5]], [[1.0, 0.5], []])


def test_text_shows_mean_and_limits() -> None:
    assert bootstrap_mean([[0.5], [0.5]]).text() == "0.500 [0.500, 0.500]"
