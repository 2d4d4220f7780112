# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.quantizers import (
    AdaRoundFakeQuantize,
    AvgMinMaxObserver,
    OwnErrorObserver,
    UniformFakeQuantize,
    quantize_layer,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(quantizer, *tensors):
    quantizer.enable_observer()
    for x in tensors:
        quantizer(x)
    quantizer.enable_observer(False)
    quantizer.commit()
    quantizer.enable_fake_quant()
    return quantizer


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("ch_axis", [-1, 2])
def test_forward_returns_decode_of_encode(bits, ch_axis):
    x = randn(2, 5, 6)
    quantizer = calibrated(UniformFakeQuantize(quant_max=2**bits - 1, ch_axis=ch_axis), x)
    assert torch.equal(quantizer(x * 1.3), quantizer.decode(quantizer.encode(x * 1.3)))
    assert len(quantizer(x).unique()) <= 2**bits * (1 if ch_axis == -1 else 6)


def test_new_quantizer_passes_its_input_through():
    x = randn(3, 4)
    assert UniformFakeQuantize(quant_max=15)(x) is x


def test_average_of_minima_and_maxima():
    observer = AvgMinMaxObserver(quant_max=15)
    for lo, hi in ((-1.0, 2.0), (-3.0, 1.0), (-2.0, 6.0)):
        observer(torch.tensor([lo, 0.1, hi]))
    assert observer.min_val.item() == pytest.approx(-2.0) and observer.max_val.item() == pytest.approx(3.0)
    params = observer.uniform_params()
    assert params.scale.item() == pytest.approx(5 / 15) and params.zero_point.item() == 6


def test_observer_without_data_says_so():
    with pytest.raises(RuntimeError, match="has seen no data: run `calibrate`"):
        AvgMinMaxObserver().uniform_params()
    observer = AvgMinMaxObserver(ch_axis=1)
    observer(randn(2, 3))
    with pytest.raises(ValueError, match="number of channels changed"):
        observer(randn(2, 4))


def test_drop_mode_quantizes_the_asked_share():
    x = randn(200, 200)
    quantizer = calibrated(UniformFakeQuantize(quant_max=15), x)
    quantizer.prob = 0.3
    share = (quantizer(x) != x).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.02)
    assert float(quantizer.state_dict()["drop_keep"]) == pytest.approx(0.3)


def test_weight_quantizer_starts_at_fp_and_ends_on_the_grid():
    weight = randn(8, 12)
    quantizer = AdaRoundFakeQuantize(observer=OwnErrorObserver, quant_max=15)
    quantizer.activation_post_process(weight)
    quantizer.commit()
    quantizer.enable_fake_quant()
    nearest = quantizer(weight)
    quantizer.init(weight)
    lo, hi = (uniform.decode(torch.full((8, 1), c), quantizer.params(2), 4) for c in (0, 15))
    torch.testing.assert_close(quantizer(weight), weight.clamp(lo, hi), rtol=0, atol=1e-4)
    assert quantizer(weight).requires_grad
    hard = quantizer.get_hard_value(weight)
    quantizer.adaround = False
    assert quantizer.alpha is None
    assert torch.equal(quantizer(hard), hard)
    # At the start alpha >= 0 exactly where the fraction is at least one half: nearest, but for ties at half.
    assert torch.equal(hard, nearest)


def test_state_dict_round_trips_into_a_fresh_quantizer():
    source = calibrated(UniformFakeQuantize(quant_max=15, ch_axis=1), randn(4, 7))
    target = UniformFakeQuantize(quant_max=15, ch_axis=1)
    target.load_state_dict(source.state_dict())
    x = randn(5, 7, seed=3)
    assert target.quantizing and torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(6, 4, bias=False), randn(3, 6)),
        (nn.Linear(6, 4), randn(2, 3, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect"), randn(2, 4, 8, 8)),
    ],
)
def test_quantized_layer_equals_layer_until_switched_on(layer, x):
    quantizer = AdaRoundFakeQuantize(quant_max=255)
    new = quantize_layer(layer, quantizer)
    assert new.weight is layer.weight
    assert torch.equal(new(x), layer(x))
    quantizer.activation_post_process(layer.weight)
    quantizer.commit()
    quantizer.enable_fake_quant()
    difference = (new(x) - layer(x)).abs().max()
    assert 0 < difference < 0.05


def test_only_linear_and_conv():
    with pytest.raises(TypeError, match="only nn.Linear and nn.Conv2d can be quantized, got LayerNorm"):
        quantize_layer(nn.LayerNorm(3), nn.Identity())


def test_bits_are_checked():
    with pytest.raises(ValueError, match="`quant_min`, `quant_max` must be 0 and"):
        UniformFakeQuantize(quant_max=14)
