# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.grouping import cluster
from ahcq_plugin.functional.uniform import UniformParams


def draw(channels: int, seed: int, bits: int = 4, spread: float = 1.0) -> tuple[UniformParams, torch.Tensor]:
    """Quantizers of channels with random offsets and log-normal widths, and weights; as after a LayerNorm."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.exp(spread * torch.randn(channels, generator=generator))
    centre = width * torch.randn(channels, generator=generator)
    params = uniform.qparams_from_range(centre - width, centre + width, bits)
    return params, torch.randint(1, 100, (channels,), generator=generator).float()


def modelled(params: UniformParams, weights, labels, groups: UniformParams, bits: int) -> float:
    """The error that ``cluster`` minimises, from 4001 points per channel instead of its closed form."""
    qmax = 2**bits - 1
    scale, zero = params.scale.double(), params.zero_point.double()
    margin = scale * (1 + (1 + 6 * qmax**2) ** 0.5) / (6 * qmax)
    x = torch.linspace(0, 1, 4001, dtype=torch.float64)
    x = ((-zero * scale - margin)[:, None] + ((qmax * scale) + 2 * margin)[:, None] * x).T
    step, z = groups.scale.double()[labels], groups.zero_point.double()[labels]
    lo, hi = -z * step, (qmax - z) * step
    clipped = (lo - x).clamp(min=0) ** 2 + (x - hi).clamp(min=0) ** 2
    return float(((clipped.mean(0) + torch.minimum(step**2 / 12, (x**2).mean(0))) * weights.double()).sum())


def is_same(a: UniformParams, b: UniformParams) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([2, 4, 8]))
def test_groups_are_valid_quantizers_and_none_is_empty(channels, count, seed, bits):
    params, weights = draw(channels, seed, bits)
    labels, groups = cluster(params, weights, count, bits)
    assert (
        labels.dtype == torch.int64 and groups.scale.dtype == torch.float32 and groups.zero_point.dtype == torch.int32
    )
    assert labels.shape == (channels,) and labels.unique().tolist() == list(range(min(count, channels)))
    assert bool((groups.scale.diff() >= 0).all()) and bool((groups.scale > 0).all())
    assert bool((groups.zero_point >= 0).all()) and bool((groups.zero_point < 2**bits).all())


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**31))
def test_result_is_deterministic_and_independent_of_the_order(channels, count, seed):
    params, weights = draw(channels, seed)
    labels, groups = cluster(params, weights, count, 4)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    shuffled = UniformParams(params.scale[order], params.zero_point[order])
    labels_2, groups_2 = cluster(shuffled, weights[order], count, 4)
    assert is_same(groups, groups_2) and torch.equal(labels[order], labels_2)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 16])
def test_equal_quantizers_stay_exact(bits):
    """Also when a group holds a single channel, and whatever their weights."""
    params, _ = draw(3, 5, bits)
    repeats = torch.tensor([0, 2, 1, 0, 2, 0, 1, 0])
    many = UniformParams(params.scale[repeats], params.zero_point[repeats])
    weights = torch.tensor([1.0, 1e6, 0.0, 3.0, 1e-9, 0.0, 2.0, 5.0])
    for count in (3, 7):
        labels, groups = cluster(many, weights, count, bits)
        assert len(groups.scale) == 3
        assert is_same(UniformParams(groups.scale[labels], groups.zero_point[labels]), many)
    labels, groups = cluster(UniformParams(params.scale[[1, 1]], params.zero_point[[1, 1]]), weights[:2], 1, bits)
    assert is_same(groups, UniformParams(params.scale[1:2], params.zero_point[1:2]))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_own_range_is_the_best_one_for_a_channel(bits, seed):
    """What the margin is for: a channel of which nobody else is in sight is left as it is."""
    params, weights = draw(1, seed, bits)
    own = modelled(params, weights, torch.zeros(1, dtype=torch.int64), params, bits)
    for factor in (0.9, 0.98, 1.02, 1.1):
        for shift in (-1, 0, 1):
            other = UniformParams(params.scale * factor, (params.zero_point + shift).clamp(0, 2**bits - 1))
            assert modelled(params, weights, torch.zeros(1, dtype=torch.int64), other, bits) > own


@pytest.mark.parametrize("bits", [4, 6])
def test_error_falls_with_more_groups_down_to_that_of_single_channels(bits):
    """Eight separable kinds of channels: up to eight groups each one helps much, then hardly."""
    kinds = torch.tensor([[-9, 1], [-1, 9], [-4, 4], [-0.5, 0.5], [-0.1, 0.6], [-30, 0.0], [0.0, 2], [-90, 80]])
    generator = torch.Generator().manual_seed(0)
    ends = kinds.repeat(6, 1) * (1 + 0.02 * torch.rand(48, 2, generator=generator))
    params, weights = uniform.qparams_from_range(ends[:, 0], ends[:, 1], bits), 1 / ends.diff()[:, 0] ** 2
    errors = []
    for count in (1, 2, 4, 8, 16, 48):
        labels, groups = cluster(params, weights, count, bits)
        errors.append(modelled(params, weights, labels, groups, bits))
        if count == 8:
            assert all(len(labels[kind::8].unique()) == 1 for kind in range(8))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[0] > 10 * errors[3] and errors[3] < 1.2 * errors[-1]


@pytest.mark.parametrize("seed", range(3))
def test_no_single_change_improves_the_modelled_error_much(seed):
    """Each channel is in its best group, and no other common step or zero point serves a group better."""
    bits = 4
    params, weights = draw(24, seed)
    labels, groups = cluster(params, weights, 3, bits)
    found = modelled(params, weights, labels, groups, bits)
    for channel in range(24):
        for group in range(3):
            moved = labels.clone()
            moved[channel] = group
            assert modelled(params, weights, moved, groups, bits) > found * (1 - 1e-4)
    for group in range(3):
        for factor in (0.8, 0.9, 1.1, 1.25):
            for shift in (-1, 0, 1):
                scale, zero = groups.scale.clone(), groups.zero_point.clone()
                scale[group] *= factor
                zero[group] = int(zero[group] + shift) % 2**bits
                assert modelled(params, weights, labels, UniformParams(scale, zero), bits) > found * (1 - 1e-3)


@pytest.mark.parametrize("outlier", [1.0, 30.0, 100.0])
def test_shared_range_is_the_best_of_all_of_them(outlier):
    """Also with a channel far wider than the many others, which are then better rounded to zero than served."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([[-1.0, 1.0]]) * (1 + 0.2 * torch.rand(60, 2, generator=generator))
    ends[0] *= outlier
    params, weights = uniform.qparams_from_range(ends[:, 0], ends[:, 1], 4), torch.ones(60)
    labels, groups = cluster(params, weights, 1, 4)
    found = modelled(params, weights, labels, groups, 4)
    scales = float(params.scale.max()) * torch.logspace(-2.2, 0.1, 60)
    every = [
        modelled(params, weights, labels, UniformParams(scale[None], torch.tensor([zero])), 4)
        for scale in scales
        for zero in (0, 4, 6, 7, 8, 9, 11, 15)
    ]
    assert found < min(every) * 1.01


def test_groups_beat_those_of_points_in_the_plane_of_scale_and_zero_point():
    """Zero points are integers and scales small: distances between the raw pairs see the zero points only."""
    ends = torch.tensor([[-1.0, 1], [-1, 1.1], [-100, 100], [-100, 110], [-1, 0.9], [-90, 100]])
    params, weights = uniform.qparams_from_range(ends[:, 0], ends[:, 1], 4), 1 / ends.diff()[:, 0] ** 2
    labels, _ = cluster(params, weights, 2, 4)
    assert labels.tolist() == [0, 0, 1, 1, 0, 1]


def test_important_channels_decide_the_range():
    """A wide channel that hardly matters is clipped; if it matters the narrow ones are rounded coarsely."""
    ends = torch.tensor([[-1.0, 1]] * 5 + [[-20.0, 20]])
    params = uniform.qparams_from_range(ends[:, 0], ends[:, 1], 4)
    _, ignoring = cluster(params, torch.tensor([1.0] * 5 + [1e-6]), 1, 4)
    _, serving = cluster(params, torch.tensor([1.0] * 5 + [1.0]), 1, 4)
    assert ignoring.scale < 1.3 * params.scale[0] and serving.scale > 0.5 * params.scale[5]


def test_channels_without_importance_get_a_group_that_fits():
    params, _ = draw(20, 3)
    labels, groups = cluster(params, torch.zeros(20), 4, 4)
    equal_labels, equal = cluster(params, torch.ones(20), 4, 4)
    assert torch.equal(labels, equal_labels) and is_same(groups, equal)
    # One of them does not count for the range, but takes the better of those there are.
    ends = torch.tensor([[-1.0, 1], [-1, 1.2], [-5, 5], [-4.5, 5], [-400, 400]])
    weights = torch.tensor([1.0, 1, 0.04, 0.04, 0])
    labels, groups = cluster(uniform.qparams_from_range(ends[:, 0], ends[:, 1], 4), weights, 2, 4)
    assert labels.tolist() == [0, 0, 1, 1, 1] and groups.scale[1] < 1


def test_constant_channels_do_not_disturb():
    """Channels that are always zero have the least scale there is."""
    ends = torch.tensor([[0.0, 0], [-1, 1], [0, 0], [-1, 1.1], [-8, 9], [-8, 8]])
    params = uniform.qparams_from_range(ends[:, 0], ends[:, 1], 4)
    labels, groups = cluster(params, torch.ones(6), 2, 4)
    assert labels[1] == labels[3] != labels[4] == labels[5]
    labels, groups = cluster(params, torch.ones(6), 1, 4)
    assert bool(groups.scale.isfinite().all()) and float(groups.scale) > 0.4


@pytest.mark.parametrize(
    "scale, weights, count, message",
    [
        (torch.ones(3), torch.ones(2), 1, r"must be \(n,\) with n >= 1, got \(3,\) and \(2,\)"),
        (torch.ones(0), torch.ones(0), 1, r"must be \(n,\) with n >= 1, got \(0,\)"),
        (torch.ones(3), torch.ones(3), 0, "`count` must be an integer of at least 1, got 0"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), 1, "`scale` must be positive and finite"),
        (torch.tensor([1.0, 0.0]), torch.ones(2), 1, "`scale` must be positive and finite"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), 1, "`weights` must be finite and not negative"),
        (torch.ones(2), torch.tensor([1.0, torch.inf]), 1, "`weights` must be finite and not negative"),
    ],
)
def test_bad_arguments_are_named(scale, weights, count, message):
    with pytest.raises(ValueError, match=message):
        cluster(UniformParams(scale, torch.zeros_like(scale)), weights, count, 4)
