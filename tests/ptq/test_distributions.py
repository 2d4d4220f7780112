# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from ahcq_plugin.graph import describe
from ahcq_plugin.ptq import Recipe, calibrate, freeze, prepare, quantizers
from ahcq_plugin.ptq.distributions import Meter, collect_distributions
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers import AdaRoundFakeQuantize, UniformFakeQuantize
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam


def uniform(scale, zero_point, bits=4, ch_axis=-1, kind=UniformFakeQuantize):
    quantizer = kind(quant_max=2**bits - 1, ch_axis=ch_axis, role="q")
    quantizer.scale.data = torch.tensor(scale)
    quantizer.zero_point = torch.tensor(zero_point, dtype=torch.int32)
    quantizer.enable_fake_quant()
    return quantizer.requires_grad_(False)


def measured(quantizer, *tensors, bins=10):
    meter = Meter("u.q", "u", "q", "q", (), quantizer)
    for x in tensors:
        meter.measure(x, quantizer(x))
    meter.start_counting(bins)
    for x in tensors:
        meter.count(x, quantizer(x))
    return meter.result()


@pytest.fixture(scope="module")
def frozen():
    """(frozen small SAM, its weights before rounding, rows)"""
    model, items = make_tiny_sam(), make_tiny_items()
    prepare(model, Recipe.from_config("rtn"))
    calibrate(model, items, box_forward, progress=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model)
    return model, weights, collect_distributions(model, items[2], box_forward, weights)


def test_figures_of_values_counted_by_hand():
    # grid 0, 0.5, 1, 1.5
    x = torch.tensor([0.0, 0.1, 0.5, 1.4, 1.74, 1.76, 3.0, -0.2, -0.3])
    row = measured(uniform([0.5], [0], bits=2), x[:4], x[4:], bins=7)
    assert row.values == 9
    assert row.saturated == 3 / 9  # 1.76, 3.0 and -0.3 are more than half a step away from the grid
    errors = x - torch.tensor([0.0, 0.0, 0.5, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0])
    assert row.sqnr_db == pytest.approx(10 * math.log10(x.square().sum() / errors.square().sum()), abs=1e-5)
    assert row.histogram.grid.tolist() == [0, 0.5, 1, 1.5] and not row.histogram.per_channel
    assert row.histogram.edges[0] == pytest.approx(-0.3) and row.histogram.edges[-1] == 3.0
    assert np.array_equal(row.histogram.counts, np.histogram(x.numpy(), row.histogram.edges)[0])


def test_values_on_the_grid_lose_nothing():
    quantizer = uniform([0.25], [3])
    row = measured(quantizer, quantizer.decode(torch.arange(16)))
    assert row.sqnr_db == math.inf and row.saturated == 0


@pytest.mark.parametrize("ch_axis", [0, 1, 2])
def test_channels_are_seen_in_units_of_their_own_range(ch_axis):
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    channels = x.shape[ch_axis]
    factors = 10.0 ** torch.arange(channels)
    view = [-1 if axis == ch_axis else 1 for axis in range(3)]
    one = measured(uniform([0.2], [0]), x)
    many = measured(uniform((0.2 * factors).tolist(), [0] * channels, ch_axis=ch_axis), x * factors.view(view))
    assert many.histogram.per_channel
    assert np.allclose(many.histogram.grid, np.arange(16) / 15, atol=1e-6)
    assert np.array_equal(many.histogram.counts, one.histogram.counts)


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 6), HeadAxis(1, 3, 2)), ((6, 5, 4), HeadAxis(3, 3, 1))])
def test_heads_are_seen_in_units_of_their_own_range(shape, axis):
    """Three heads share an axis, with their channels or with windows; each has ten times the range of the last."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3
    quantizer = UniformFakeQuantize(quant_max=15, per_head=True)
    quantizer.lay_out(axis)
    quantizer.scale.data, quantizer.zero_point = torch.tensor([0.2, 2.0, 20.0]), torch.zeros(3, dtype=torch.int32)
    quantizer.enable_fake_quant()
    quantizer.requires_grad_(False)
    many = measured(quantizer, quantizer.grids(shape).scale / 0.2 * x)
    one = measured(uniform([0.2], [0]), x)
    assert many.histogram.per_channel and many.saturated == one.saturated
    assert np.allclose(many.histogram.grid, np.arange(16) / 15, atol=1e-6)
    assert np.array_equal(many.histogram.counts, one.histogram.counts)


def test_counts_do_not_stop_where_float32_does(monkeypatch):
    monkeypatch.setattr("ahcq_plugin.ptq.distributions._CHUNK", 1000)
    row = measured(uniform([0.1], [0]), torch.zeros(10_500), torch.ones(7))
    assert row.histogram.counts.sum() == 10_507 and row.histogram.counts[0] == 10_500


def test_every_quantizer_has_a_row_in_the_order_of_the_role_table(frozen):
    model, _, rows = frozen
    assert {row.name for row in rows} == {name for name, _ in quantizers(model)}
    table = [(row.unit, row.node, row.role, row.layers) for row in describe(model)]
    assert [(row.unit, row.node, row.role, row.layers) for row in rows] == table


def test_histograms_stand_for_the_median_and_the_worst_of_each_role(frozen):
    _, _, rows = frozen
    for role in {row.role for row in rows}:
        found = sorted((row for row in rows if row.role == role), key=lambda row: row.sqnr_db)
        shown = {row.shown: row for row in found if row.shown}
        assert {row.name for row in found if row.histogram is not None} == {row.name for row in shown.values()}
        if len(found) == 1:
            assert set(shown) == {"only"}
            continue
        assert set(shown) == {"median", "worst"}
        assert shown["worst"].sqnr_db == found[0].sqnr_db
        assert shown["median"].sqnr_db == found[len(found) // 2].sqnr_db
        assert all(row.histogram.counts.sum() == row.values for row in shown.values())


def test_figures_agree_with_the_tensors_that_flow(frozen):
    model, weights, rows = frozen
    name, quantizer = next((n, q) for n, q in quantizers(model) if q.role == "post_act")
    seen = []
    handle = quantizer.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        box_forward(model, make_tiny_items()[2])
    handle.remove()
    ((x, out),) = seen
    row = next(row for row in rows if row.name == name)
    assert row.values == x.numel()
    assert row.sqnr_db == pytest.approx(10 * math.log10(x.square().sum() / (x - out).square().sum()), abs=1e-4)
    layer_name, layer = next(iter(weight_layers(model).items()))
    before = weights[f"{layer_name}.weight"]
    noise = (before - layer.weight).square().sum()
    row = next(row for row in rows if row.name == f"{layer_name}.weight_fake_quant")
    assert row.sqnr_db == pytest.approx(10 * math.log10(before.square().sum() / noise), abs=1e-4)


def test_without_the_weights_before_rounding_there_are_no_weights(frozen):
    model, weights, rows = frozen
    without = collect_distributions(model, make_tiny_items()[2], box_forward)
    assert [(row.name, row.sqnr_db) for row in without] == [
        (row.name, row.sqnr_db) for row in rows if row.role != "weight"
    ]
    missing = dict(weights)
    name = next(key for key in weights if key.endswith("lin1.weight"))
    missing[name] = weights[name][:1]
    with pytest.raises(ValueError, match=rf"`weights`: {name} has shape"):
        collect_distributions(model, make_tiny_items()[2], box_forward, missing)
    del missing[name]
    with pytest.raises(ValueError, match=f"`weights` lacks {name}"):
        collect_distributions(model, make_tiny_items()[2], box_forward, missing)


def test_the_model_is_left_as_it_was(frozen):
    model, _, _ = frozen
    assert not any(q._forward_hooks for _, q in quantizers(model))


def test_a_model_that_is_not_frozen_is_refused(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    with pytest.raises(ValueError, match="call `freeze` first"):
        collect_distributions(tiny_sam, tiny_items[0], box_forward)


def test_a_weight_quantizer_measures_per_output_channel():
    quantizer = uniform([1.0, 2.0], [0, 0], bits=2, ch_axis=0, kind=AdaRoundFakeQuantize)
    row = measured(quantizer, torch.tensor([[0.0, 3.0, 4.0], [0.0, 6.0, 6.5]]))
    assert row.saturated == 1 / 6 and row.histogram.edges[-1] == pytest.approx(4 / 3)


def test_grouped_channels_have_a_grid_each(tiny_sam, tiny_items):
    """Channels lie on the last axis of CAG's tensors, whatever their number of dimensions."""
    prepare(tiny_sam, Recipe.from_config("rtn", cag=True))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    freeze(tiny_sam)
    rows = collect_distributions(tiny_sam, tiny_items[0], box_forward)
    grouped = [row for row in rows if row.role in ("qkv_in", "mlp_in")]
    assert grouped and all(row.sqnr_db > 5 and row.saturated < 0.2 for row in grouped)
    shown = [row.histogram for row in grouped if row.histogram is not None]
    assert shown and all(histogram.per_channel for histogram in shown)


def test_a_recipe_with_a_scale_for_each_head_has_its_report(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn", per_head=True))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    freeze(tiny_sam)
    rows = [row for row in collect_distributions(tiny_sam, tiny_items[0], box_forward) if row.role in ("q", "k", "v")]
    assert rows and all(row.sqnr_db > 5 and row.saturated < 0.2 for row in rows)
    shown = [row.histogram for row in rows if row.histogram is not None]
    assert shown and all(histogram.per_channel for histogram in shown)
