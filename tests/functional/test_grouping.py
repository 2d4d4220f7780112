# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.functional import grouping
from ahcq_plugin.functional.grouping import POINTS, SHARES, cluster, fit
from ahcq_plugin.functional.uniform import UniformParams


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels(width, centre=0.0, seed=0, rows=400):
    """Points of channels with normal values of the given widths and centres (n,)."""
    width = torch.as_tensor(width, dtype=torch.float32)
    x = normal(rows, len(width), seed=seed) * width + torch.as_tensor(centre)
    return grouping.describe_channels(x, x.amin(0), x.amax(0))


def draw(count, seed, spread=1.0):
    """Points of channels with random centres and log-normal widths, and weights; as after a LayerNorm."""
    width = torch.exp(spread * normal(count, seed=seed))
    weights = torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(seed)).float()
    return channels(width, width * normal(count, seed=seed + 1), seed), weights


def modelled(points, weights, labels, groups, bits):
    """The error that is minimised, written out."""
    scale, zero = groups.scale.double()[labels, None], groups.zero_point.double()[labels, None]
    x = points.double()
    clipped = (x - torch.maximum(torch.minimum(x, (2**bits - 1 - zero) * scale), -zero * scale)) ** 2
    rounding = torch.minimum(scale[:, 0] ** 2 / 12, (x**2 * SHARES).sum(1))
    return float((((clipped * SHARES).sum(1) + rounding) * weights.double()).sum())


def is_same(a, b):
    return torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


def test_points_describe_the_values():
    """Shares add up to one and give the second moment of normal values; ends are those given; ascending."""
    assert float(SHARES.sum()) == pytest.approx(1) and torch.equal(SHARES, SHARES.flip(0)) and len(SHARES) == POINTS
    points = channels([1.0, 3.0], [0.0, 1.0], rows=20000)
    moments = (points.double() ** 2 * SHARES).sum(1)
    torch.testing.assert_close(moments, torch.tensor([1.0, 10.0]).double(), rtol=0.2, atol=0)  # ends count extra
    assert points.dtype == torch.float32 and bool((points.diff(dim=1) >= 0).all())
    one = grouping.describe_channels(torch.tensor([[2.0, -1.0]]), torch.tensor([-3.0, -1]), torch.tensor([5.0, -1]))
    assert one[0].tolist() == [-3.0] + [2.0] * 13 + [5.0] and one[1].tolist() == [-1.0] * 15


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([2, 4, 8]))
def test_groups_are_valid_quantizers_and_none_is_empty(n, count, seed, bits):
    labels, groups = cluster(*draw(n, seed), count, bits)
    assert (
        labels.dtype == torch.int64 and groups.scale.dtype == torch.float32 and groups.zero_point.dtype == torch.int32
    )
    assert labels.shape == (n,) and labels.unique().tolist() == list(range(min(count, n)))
    assert bool((groups.scale.diff() >= 0).all()) and bool((groups.scale > 0).all())
    assert bool((groups.zero_point >= 0).all()) and bool((groups.zero_point < 2**bits).all())


@settings(max_examples=15)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**31))
def test_result_is_deterministic_and_independent_of_the_order(n, count, seed):
    points, weights = draw(n, seed)
    labels, groups = cluster(points, weights, count, 4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    labels_2, groups_2 = cluster(points[order], weights[order], count, 4)
    assert is_same(groups, groups_2) and torch.equal(labels[order], labels_2)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_group_of_equal_channels_has_the_quantizer_of_one_of_them(bits):
    """Whatever their weights; and no more groups are made than channels differ."""
    points, _ = draw(3, 5)
    repeats = torch.tensor([0, 2, 1, 0, 2, 0, 1, 0])
    weights = torch.tensor([1.0, 1e6, 0.0, 3.0, 1e-9, 0.0, 2.0, 5.0])
    alone = fit(points, bits)
    expected = UniformParams(alone.scale[repeats], alone.zero_point[repeats])
    for count in (3, 7):
        labels, groups = cluster(points[repeats], weights, count, bits)
        assert len(groups.scale) == 3
        assert is_same(UniformParams(groups.scale[labels], groups.zero_point[labels]), expected)
    _, groups = cluster(points[[1, 1]], weights[:2], 1, bits)
    assert is_same(groups, UniformParams(alone.scale[1:2], alone.zero_point[1:2]))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantizers_follow_the_unit_of_the_data(bits):
    """Values twice as large give twice the scale; so a learned change of scale carries over."""
    points, weights = draw(12, 4)
    for plain, doubled in (
        (fit(points, bits), fit(points * 2, bits)),
        (cluster(points, weights, 3, bits)[1], cluster(points * 2, weights, 3, bits)[1]),
    ):
        assert torch.equal(plain.scale * 2, doubled.scale) and torch.equal(plain.zero_point, doubled.zero_point)


@pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0])
def test_shared_range_is_the_best_of_all_of_them(outlier):
    """Also with a channel far wider than the many others, which are then better rounded to zero than served."""
    points, weights = channels([outlier] + [1.0] * 59), torch.ones(60)
    labels, groups = cluster(points, weights, 1, 4)
    found = modelled(points, weights, labels, groups, 4)
    scales = 0.5 * outlier * torch.logspace(-2.2, 0.3, 80)
    every = [
        modelled(points, weights, labels, UniformParams(scale[None], torch.tensor([zero])), 4)
        for scale in scales
        for zero in (0, 4, 6, 7, 8, 9, 11, 15)
    ]
    assert found < min(every) * 1.01


def test_best_range_clips_more_with_fewer_bits():
    """At few bits the tails of normal values are worth less than the resolution, at many they are not."""
    points = channels([1.0], rows=20000)
    widths = [float(fit(points, bits).scale) * (2**bits - 1) for bits in (2, 3, 4, 6, 8)]
    assert widths == sorted(widths) and widths[0] < 5 and widths[2] < 7.5 and 8 < widths[-1] < 9


@pytest.mark.parametrize("bits", [4, 6])
def test_error_falls_with_more_groups_down_to_that_of_single_channels(bits):
    """Eight separable kinds of channels: up to eight groups each one helps much, then hardly."""
    width = torch.tensor([1.0, 1, 1, 0.1, 0.02, 10, 10, 60]).repeat(6) * (1 + 0.05 * normal(48))
    centre = torch.tensor([-4.0, 4, 0, 0, 0.1, 0, 30, 0]).repeat(6)
    points, weights = channels(width, centre), 1 / width**2
    errors = []
    for count in (1, 2, 4, 8, 16, 48):
        labels, groups = cluster(points, weights, count, bits)
        errors.append(modelled(points, weights, labels, groups, bits))
        if count == 8:
            assert all(len(labels[kind::8].unique()) == 1 for kind in range(8))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] > 10 * errors[3] and errors[3] < 1.4 * errors[-1]


@pytest.mark.parametrize("seed", range(3))
def test_no_single_change_improves_the_modelled_error_much(seed):
    """Each channel is in its best group, and no other common step or zero point serves a group better."""
    bits = 4
    points, weights = draw(24, seed)
    labels, groups = cluster(points, weights, 3, bits)
    found = modelled(points, weights, labels, groups, bits)
    for channel in range(24):
        for group in range(3):
            moved = labels.clone()
            moved[channel] = group
            assert modelled(points, weights, moved, groups, bits) > found * (1 - 1e-4)
    for group in range(3):
        for factor in (0.8, 0.9, 1.1, 1.25):
            for shift in (-1, 0, 1):
                scale, zero = groups.scale.clone(), groups.zero_point.clone()
                scale[group] *= factor
                zero[group] = int(zero[group] + shift) % 2**bits
                assert modelled(points, weights, labels, UniformParams(scale, zero), bits) > found * (1 - 1e-3)


def test_widths_count_more_than_zero_points():
    """In the plane of (scale, zero point), integers as zero points outweigh any difference of small scales."""
    width = torch.tensor([0.01, 0.01, 1.0, 1.0, 0.01, 1.0])
    points = channels(width, width * torch.tensor([1, -1, 1, -1, 0, 0]))
    zero_points = fit(points, 4).zero_point
    assert int(zero_points[0] - zero_points[1]) <= -3, "channels 0 and 2, and 1 and 3, are neighbours there"
    assert cluster(points, 1 / width**2, 2, 4)[0].tolist() == [0, 0, 1, 1, 0, 1]


def test_important_channels_decide_the_range():
    """A wide channel that hardly matters is clipped; if it matters the narrow ones are rounded coarsely."""
    points = channels([1.0] * 5 + [20.0])
    alone = fit(points, 4).scale
    _, ignoring = cluster(points, torch.tensor([1.0] * 5 + [1e-6]), 1, 4)
    _, serving = cluster(points, torch.tensor([1.0] * 5 + [1.0]), 1, 4)
    assert ignoring.scale < 1.3 * alone[0] and serving.scale > 0.5 * alone[5]


def test_channels_without_importance_get_a_group_that_fits():
    points, _ = draw(20, 3)
    labels, groups = cluster(points, torch.zeros(20), 4, 4)
    equal_labels, equal = cluster(points, torch.ones(20), 4, 4)
    assert torch.equal(labels, equal_labels) and is_same(groups, equal)
    # One of them does not count for the range, but takes the better of those there are.
    labels, groups = cluster(channels([1.0, 1, 5, 5, 400]), torch.tensor([1.0, 1, 0.04, 0.04, 0]), 2, 4)
    assert labels.tolist() == [0, 0, 1, 1, 1] and groups.scale[1] < 3


def test_constant_channels_do_not_disturb():
    points = channels([0.0, 1, 0, 1, 8, 8])
    assert bool((fit(points, 4).scale > 0).all())
    labels, groups = cluster(points, torch.ones(6), 2, 4)
    assert labels[1] == labels[3] != labels[4] == labels[5]
    labels, groups = cluster(points, torch.ones(6), 1, 4)
    assert bool(groups.scale.isfinite().all()) and float(groups.scale) > 0.4
    labels, groups = cluster(channels([0.0, 0.0]), torch.ones(2), 2, 4)
    assert labels.tolist() == [0, 0] and bool((groups.scale > 0).all())


@pytest.mark.parametrize(
    "points, weights, count, message",
    [
        (torch.ones(3, 15), torch.ones(2), 1, r"must be \(n, 15\) and `weights` \(n,\) with n >= 1, got \(3, 15\) and"),
        (torch.ones(3, 4), torch.ones(3), 1, r"must be \(n, 15\) .* got \(3, 4\)"),
        (torch.ones(0, 15), torch.ones(0), 1, r"must be \(n, 15\) .* got \(0, 15\)"),
        (torch.ones(3, 15), torch.ones(3), 0, "`count` must be an integer of at least 1, got 0"),
        (torch.full((1, 15), torch.nan), torch.ones(1), 1, "`points` must be finite"),
        (torch.ones(2, 15), torch.tensor([1.0, -1.0]), 1, "`weights` must be finite and not negative"),
        (torch.ones(2, 15), torch.tensor([1.0, torch.inf]), 1, "`weights` must be finite and not negative"),
    ],
)
def test_bad_arguments_are_named(points, weights, count, message):
    with pytest.raises(ValueError, match=message):
        cluster(points, weights, count, 4)
