# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ahcq_plugin.quantizers import PercentileObserver, UniformFakeQuantize
from ahcq_plugin.quantizers.percentiles import PERCENTILES


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("axis", [-1, 1])
def test_candidates_are_mean_quantiles_the_widest_first(axis):
    observer = PercentileObserver(quant_max=15, ch_axis=axis)
    calls = [values(0, 4, 3, 50), values(1, 2, 3, 70), values(2, 1, 3, 7)]
    for x in calls:
        observer(x)
    rows = [(x.reshape(1, -1) if axis == -1 else x.transpose(0, 1).reshape(3, -1)).double().numpy() for x in calls]
    ranges = observer.ranges()
    assert len(ranges) == len(PERCENTILES) + 1
    for (lo, hi), share in zip(ranges, (1.0, *sorted(PERCENTILES, reverse=True)), strict=True):
        for found, at in ((lo, 1 - share), (hi, share)):
            wanted = np.mean([np.quantile(part, at, axis=1) for part in rows], axis=0)
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    observer.reset()
    with pytest.raises(RuntimeError, match="the observer has seen no data"):
        observer.ranges()


def test_large_tensors_are_sampled_and_extremes_are_exact(monkeypatch):
    monkeypatch.setattr("ahcq_plugin.quantizers.percentiles.MOST_VALUES", 1000)
    x = values(3, 100, 100)
    x[17, 31] = 1e3
    observer = PercentileObserver(quant_max=15)
    observer(x)
    assert float(observer.ranges()[0][1]) == 1e3
    narrow = [hi for _, hi in observer.ranges()][-1]
    assert float(narrow) == pytest.approx(float(np.quantile(x.numpy(), 0.85)), rel=0.3)


def test_without_a_choice_the_range_is_the_mean_of_extremes():
    plain, sampled = (UniformFakeQuantize(quant_max=15, **kind) for kind in ({}, {"observer": PercentileObserver}))
    for quantizer in (plain, sampled):
        for seed in range(3):
            quantizer.observe(values(seed, 5, 20))
        quantizer.commit()
    assert torch.equal(plain.scale, sampled.scale) and torch.equal(plain.zero_point, sampled.zero_point)


def test_what_is_tried_is_what_is_quantized():
    x = values(4, 6, 9)
    quantizer = UniformFakeQuantize(PercentileObserver, quant_max=15)
    quantizer.observe(x)
    quantizer.commit()
    tried = quantizer.quantize_with(x, quantizer.params())
    quantizer.enable_fake_quant()
    assert torch.equal(tried, quantizer(x))
