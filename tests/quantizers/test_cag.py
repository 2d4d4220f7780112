# SPDX-License-Identifier: Apache-2.0
"""Channel-aware grouping: parameters per channel, then per group of channels of the last axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.uniform import UniformParams
from ahcq_plugin.quantizers.base import MILESTONES, MIN_SCALE
from ahcq_plugin.quantizers.cag import CAGFakeQuantize
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, ChannelObserver
from ahcq_plugin.quantizers.uniform import UniformFakeQuantize


def tokens(*shape, seed=0):
    """Values with an offset and a width of their own in every channel of the last axis."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.Generator().manual_seed(99)  # the same for every seed
    width = torch.exp(torch.randn(shape[-1], generator=channels))
    return (torch.randn(*shape, generator=generator) + torch.randn(shape[-1], generator=channels)) * width


def calibrated(quantizer, *items):
    quantizer.activation_post_process.reset()
    quantizer.enable_fake_quant(False)
    quantizer.enable_observer()
    for x in items:
        quantizer(x)
    quantizer.enable_observer(False)
    quantizer.commit()
    quantizer.enable_fake_quant()
    return quantizer


def grouped(channels=48, groups=4, bits=4, count=None):
    """A calibrated quantizer with ``count`` groups (None: as many as ``groups``)."""
    quantizer = calibrated(CAGFakeQuantize(quant_max=2**bits - 1, groups=groups), tokens(2, 30, channels))
    quantizer.regroup(groups if count is None else count)
    return quantizer


@settings(max_examples=25)
@given(
    st.sampled_from([3, 4, 8]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([(), (1,), (5,), (2, 3), (1, 7, 3), (0,), (2, 0, 3)]),
    st.sampled_from([0, 1, 3]),
    st.integers(0, 2**31),
)
def test_forward_is_decode_of_encode_and_codes_are_in_range(bits, dtype, leading, groups, seed):
    """For any shape before the channels, values beyond the range included."""
    channels = 11
    quantizer = calibrated(CAGFakeQuantize(quant_max=2**bits - 1, groups=groups), tokens(64, channels))
    quantizer.finish()
    x = (2 * tokens(*leading, channels, seed=seed)).to(dtype)
    codes, out = quantizer.encode(x), quantizer(x)
    assert codes.dtype == torch.int64 and bool(((codes >= 0) & (codes < 2**bits)).all())
    assert out.dtype == dtype and torch.equal(out, quantizer.decode(codes).to(dtype))


@pytest.mark.parametrize("bits", [3, 6])
def test_start_is_uniform_quantization_per_channel(bits):
    """With the range of least error: on new items better than the mean minimum and maximum.

    These clip too little at 3 bits and too much at 6; at 4 bits they happen to fit normal values.
    """
    items, held_out = [tokens(1, 100, 24, seed=seed) for seed in range(4)], tokens(1000, 24, seed=9)
    ours = calibrated(CAGFakeQuantize(quant_max=2**bits - 1), *items)
    other = calibrated(UniformFakeQuantize(quant_max=2**bits - 1, ch_axis=1), *(x[0] for x in items))
    errors = [float(((q(held_out) - held_out) ** 2).sum()) for q in (ours, other)]
    assert errors[0] < 0.9 * errors[1]
    assert ours.labels.tolist() == list(range(24)) and ours.zero_point.dtype == torch.int32
    other.scale.data, other.zero_point = ours.scale.data, ours.zero_point
    assert torch.equal(ours(held_out), other(held_out)) and torch.equal(ours.encode(held_out), other.encode(held_out))


def test_one_group_is_uniform_quantization_per_tensor():
    quantizer = grouped(groups=1)
    params = UniformParams(quantizer.scale.detach(), quantizer.zero_point)
    x = tokens(20, 48, seed=1)
    assert params.scale.numel() == 1 and torch.equal(quantizer(x), uniform.fake_quantize(x, params, 4))


def test_range_of_the_last_axis_is_averaged_over_calls():
    quantizer = CAGFakeQuantize(quant_max=15)
    calibrated(quantizer, torch.tensor([[-1.0, 0.0], [2.0, 3.0]]), torch.tensor([[[-3.0, 0.5]], [[0.0, 6.0]]]))
    observer = quantizer.activation_post_process
    assert observer.min_val.tolist() == [-2.0, 0.25] and observer.max_val.tolist() == [1.0, 4.5]
    assert {-2.0, 1.0} <= set(quantizer.points[0].tolist()) and {0.25, 4.5} <= set(quantizer.points[1].tolist())


def test_observer_samples_evenly_and_within_bounds():
    """Rows of all calls, from the first to the last; each row whole."""
    observer = ChannelObserver(quant_max=15)
    for call in range(40):
        observer(torch.arange(1000.0).view(10, 100, 1) * torch.tensor([1.0, -1.0]) + call * 1000)
        assert len(observer.sample) <= observer.most
    calls = (observer.sample.sum(1) / 2000).round()
    assert len(calls.unique()) == 40 and len(observer.sample) > observer.most / 4
    row = observer.sample[:, 0] - calls * 1000
    assert torch.equal(observer.sample[:, 1], calls * 1000 - row) and row.min() < 20 and row.max() > 980
    assert "sample" not in observer.state_dict()
    observer.reset()
    assert observer(torch.zeros(0, 3)).shape == (0, 3) and not observer.sample.numel()


@pytest.mark.parametrize("groups, counts", [(4, (32, 16, 8, 4)), (1, (8, 4, 2, 1)), (12, (48, 48, 24, 12))])
def test_milestones_reach_the_count_step_by_step(groups, counts):
    quantizer = calibrated(CAGFakeQuantize(quant_max=15, groups=groups), tokens(2, 30, 48))
    assert not quantizer.milestone(0.1) and quantizer.scale.numel() == 48
    before = 48
    for share, count in zip(MILESTONES, counts, strict=True):
        old = quantizer.scale
        assert quantizer.milestone(share) is (count < before)
        assert (quantizer.scale is not old) == (count < before) and quantizer.scale.requires_grad
        assert quantizer.scale.shape == quantizer.zero_point.shape == (count,)
        assert quantizer.labels.unique().tolist() == list(range(count)) and quantizer.labels.dtype == torch.int64
        assert quantizer.learnable_scales() == [quantizer.scale]
        kept = quantizer.state_dict()
        assert not quantizer.milestone(share), "a milestone passed twice changes nothing"
        assert all(torch.equal(kept[key], value) for key, value in quantizer.state_dict().items())
        before = count
    assert not quantizer.problems()
    quantizer.finish()
    assert quantizer.scale.numel() == counts[-1] and not quantizer.milestone(0.2), "groups never become more"


def test_finish_groups_at_once_and_only_once():
    quantizer = calibrated(CAGFakeQuantize(quant_max=15), tokens(2, 30, 48))
    assert quantizer.problems() == ["it has 48 groups of channels, allowed are 4"]
    quantizer.finish()
    scale, labels = quantizer.scale, quantizer.labels.clone()
    assert scale.numel() == 4 and quantizer.problems() == []
    quantizer.finish()
    assert quantizer.scale is scale and torch.equal(quantizer.labels, labels)


def test_fewer_channels_than_groups_and_groups_switched_off():
    for quantizer, channels in ((CAGFakeQuantize(quant_max=15), 3), (CAGFakeQuantize(quant_max=15, groups=0), 48)):
        x = tokens(5, channels)
        before = calibrated(quantizer, x)(x)
        assert not quantizer.milestone(0.8)
        quantizer.finish()
        assert quantizer.scale.numel() == channels and torch.equal(quantizer(x), before) and not quantizer.problems()


def test_uncalibrated_quantizer_can_be_finished():
    quantizer = CAGFakeQuantize(quant_max=15)
    quantizer.finish()
    x = tokens(5, 6)
    assert quantizer(x) is x


def test_commit_forgets_groups_and_gradients_of_an_earlier_calibration():
    x = tokens(20, 12, seed=3)
    quantizer = grouped(channels=48)
    quantizer(tokens(4, 48)).sum().backward()
    calibrated(quantizer, x)
    fresh = calibrated(CAGFakeQuantize(quant_max=15), x)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in quantizer.state_dict().items())
    quantizer(x).square().sum().backward()
    quantizer.finish()
    fresh.finish()
    assert torch.equal(quantizer(x), fresh(x))


@pytest.mark.parametrize("count", [1, 4, 48])
def test_permutation_makes_groups_contiguous(count):
    quantizer = grouped(count=count)
    order, starts = quantizer.permutation(), quantizer.boundaries()
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(48))
    ends = [*starts[1:].tolist(), 48]
    for group, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        inside = order[start:end]
        assert end > start and bool((quantizer.labels[inside] == group).all())
        assert bool((inside.diff() > 0).all()), "stable: channels keep their order within a group"
    x = tokens(6, 48, seed=4)
    scale, zero_point = quantizer.scale[quantizer.labels][order], quantizer.zero_point[quantizer.labels][order]
    permuted = uniform.fake_quantize(x[:, order], UniformParams(scale, zero_point), 4)
    assert torch.equal(permuted[:, order.argsort()], quantizer(x))


def test_gradient_of_a_group_is_the_sum_over_its_channels():
    """Against uniform quantization with a scale per channel; each group with the factor for its number of values."""
    quantizer = grouped()
    x = tokens(3, 5, 48, seed=5).requires_grad_()
    weight = tokens(3, 5, 48, seed=6)
    ours = torch.autograd.grad((quantizer(x) * weight).sum(), (x, quantizer.scale))
    scale = quantizer.scale.detach()[quantizer.labels].requires_grad_()
    out = uniform.fake_quantize(x, UniformParams(scale, quantizer.zero_point[quantizer.labels]), 4)
    alone = torch.autograd.grad((out * weight).sum(), (x, scale))
    assert torch.equal(ours[0], alone[0])
    for group in range(4):
        members = quantizer.labels == group
        factor = (15 * int(members.sum()) * 15) ** -0.5
        torch.testing.assert_close(ours[1][group], alone[1][members].sum() * factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [0, 3])
def test_gradient_matches_finite_differences_where_the_scale_only_moves_levels(groups):
    """Of the values beyond the range: they sit on the last level, which moves with the scale."""
    quantizer = grouped(channels=9, groups=groups, count=groups or 9)
    lowest = quantizer.decode(torch.zeros(1, 9, dtype=torch.int64))
    x = torch.cat([lowest * 1.5 - 1, quantizer.decode(torch.full((1, 9), 15)) * 1.5 + 1]).detach()
    ours = torch.autograd.grad(quantizer(x).sum(), quantizer.scale)[0]
    for group in range(quantizer.scale.numel()):
        count = 2 * int((quantizer.labels == group).sum())
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                quantizer.scale[group] += step
                values.append(float(quantizer(x).double().sum()))
                quantizer.scale[group] -= step
        slope = (values[0] - values[1]) / 2e-2
        assert float(ours[group]) == pytest.approx(slope * (count * 15) ** -0.5, rel=1e-3, abs=1e-3)


def test_state_dict_round_trips_into_a_fresh_quantizer_at_any_stage():
    source = calibrated(CAGFakeQuantize(quant_max=15), tokens(2, 30, 48))
    x = tokens(5, 48, seed=8)
    for share in (None, *MILESTONES):
        if share is not None:
            source.milestone(share)
            with torch.no_grad():
                source.scale *= 1.07  # learned
        target = CAGFakeQuantize(quant_max=15)
        target.load_state_dict(source.state_dict())
        assert target.quantizing and torch.equal(target(x), source(x))
        assert target.scale.requires_grad and torch.equal(target.permutation(), source.permutation())
        resumed = CAGFakeQuantize(quant_max=15)
        resumed.load_state_dict(source.state_dict())
        resumed.finish()
        target.finish()
        assert torch.equal(resumed(x), target(x)) and resumed.scale.numel() == 4


def test_grouping_uses_what_was_learned():
    """Learned per-channel scales, and later the change of a group's scale, enter the next clustering."""
    items = tokens(2, 30, 48)
    plain, learned = (calibrated(CAGFakeQuantize(quant_max=15), items) for _ in range(2))
    with torch.no_grad():
        learned.scale *= 1.5
    for quantizer in (plain, learned):
        quantizer.regroup(8)
    assert torch.equal(learned.labels, plain.labels)
    torch.testing.assert_close(learned.scale / plain.scale, torch.full((8,), 1.5))
    with torch.no_grad():
        learned.scale /= 1.5
    for quantizer in (plain, learned):
        quantizer.regroup(2)
    torch.testing.assert_close(learned.scale, plain.scale)


def test_a_channel_that_stays_alone_keeps_what_it_learned():
    quantizer = calibrated(CAGFakeQuantize(quant_max=15), tokens(2, 30, 48))
    with torch.no_grad():
        quantizer.scale *= torch.linspace(0.8, 1.3, 48)
    learned = quantizer.scale.detach().clone()
    quantizer.regroup(40)
    alone = torch.bincount(quantizer.labels)[quantizer.labels] == 1
    assert int(alone.sum()) > 20
    torch.testing.assert_close(quantizer.scale.detach()[quantizer.labels][alone], learned[alone], rtol=1e-5, atol=0)


def test_milestones_lose_nothing_against_grouping_at_once():
    """Without learning in between the channels are clustered as if there had been no milestone before."""
    steps, at_once = (calibrated(CAGFakeQuantize(quant_max=15), tokens(2, 30, 48)) for _ in range(2))
    for share in MILESTONES:
        steps.milestone(share)
    at_once.finish()
    assert torch.equal(steps.labels, at_once.labels) and torch.equal(steps.zero_point, at_once.zero_point)
    torch.testing.assert_close(steps.scale, at_once.scale)


def test_consumers_give_importance_and_lower_the_error_of_their_output():
    """Layers that read half of the channels only: the other half, wide as it is, must not cost them anything."""
    wide = torch.where(torch.arange(48) % 2 == 0, 20.0, 1.0)
    x, held_out = tokens(2, 200, 48) * wide, tokens(2, 100, 48, seed=1) * wide
    layers = (nn.Linear(48, 16), nn.Linear(48, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (torch.arange(48) % 2))
    quantizer = CAGFakeQuantize(quant_max=15, groups=2)
    assert torch.equal(calibrated(quantizer, x).importance(), torch.ones(48))
    quantizer.consumers = layers
    expected = layers[0].weight.square().sum(0) + layers[1].weight.square().sum(0)
    torch.testing.assert_close(quantizer.importance(), expected)
    errors = []
    for consumers in ((), layers):
        quantizer = calibrated(CAGFakeQuantize(quant_max=15, groups=2), x)
        quantizer.consumers = consumers
        quantizer.finish()
        difference = quantizer(held_out) - held_out
        errors.append(sum(float((difference @ layer.weight.T).square().sum()) for layer in layers))
    assert errors[1] < 0.5 * errors[0]
    assert not any("consumers" in key for key in quantizer.state_dict())


def test_channels_that_are_always_zero_stay_zero():
    x = tokens(2, 30, 12)
    x[..., ::3] = 0
    quantizer = calibrated(CAGFakeQuantize(quant_max=15, groups=2), x)
    assert float(quantizer.scale.min()) == pytest.approx(MIN_SCALE)
    quantizer.finish()
    assert bool((quantizer(x)[..., ::3] == 0).all()) and bool(quantizer.scale.isfinite().all())


def test_scales_stay_positive():
    quantizer = grouped()
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([-0.5, 0.0, 0.25, -1e-12]))
    quantizer.keep_valid()
    assert quantizer.scale.tolist() == [0.5, MIN_SCALE, 0.25, MIN_SCALE]


def test_bad_arguments_are_named():
    for groups in (-1, True, 2.0):
        with pytest.raises(ValueError, match=r"`groups` must be an integer >= 0 \(0: one for every channel\), got"):
            CAGFakeQuantize(quant_max=15, groups=groups)
    with pytest.raises(RuntimeError, match="has seen no data: run `calibrate`"):
        CAGFakeQuantize(quant_max=15).commit()
    with pytest.raises(RuntimeError, match="has no sample left of its calibration: run `calibrate` again"):
        grouped().commit()
    with pytest.raises(RuntimeError, match="must be finite: look for NaN or overflow"):
        calibrated(CAGFakeQuantize(quant_max=15), torch.tensor([[0.0, torch.inf]]))
    with pytest.raises(TypeError, match="needs a ChannelObserver, got AvgMinMaxObserver"):
        CAGFakeQuantize(AvgMinMaxObserver, quant_max=15)
    quantizer = CAGFakeQuantize(quant_max=15)
    quantizer.activation_post_process(tokens(3, 4))
    with pytest.raises(ValueError, match="number of channels changed"):
        quantizer.activation_post_process(tokens(3, 5))
