# SPDX-License-Identifier: Apache-2.0
"""Fake quantizers with searched parameters: HLUQ, LNQ, AGQ and powers of two."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from ahcq_plugin.functional import lnq
from ahcq_plugin.quantizers import AvgMinMaxObserver
from ahcq_plugin.quantizers.base import MIN_SCALE
from ahcq_plugin.quantizers.hluq import HLUQFakeQuantize
from ahcq_plugin.quantizers.lnq import LNQFakeQuantize
from ahcq_plugin.quantizers.power_of_two import PowerOfTwoFakeQuantize

_SPEC = importlib.util.spec_from_file_location("table_helpers", Path(__file__).with_name("table_helpers.py"))
_helpers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_helpers)
all_families, learned_families = _helpers.all_families, _helpers.learned_families
calibrated, items_for, observe = _helpers.calibrated, _helpers.items_for, _helpers.observe
rand, randn, same = _helpers.rand, _helpers.randn, _helpers.same


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@all_families
def test_forward_returns_decode_of_encode(family, bits):
    if family is PowerOfTwoFakeQuantize:
        bits = min(bits, 6)
    items = items_for(family)
    quantizer = calibrated(family, items, bits=bits)
    x = items[0] * 1.3
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))
    codes = quantizer.encode(x)
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits and len(quantizer(x).unique()) <= 2**bits
    half = x.to(torch.bfloat16)
    assert torch.equal(quantizer(half), quantizer.decode(quantizer.encode(half)).to(torch.bfloat16))


def cases():
    one_hot = torch.eye(16)
    yield "zeros", torch.zeros(3, 8, 16), 0.0
    yield "one_hot", one_hot.expand(2, 16, 16), 0.0
    yield "uniform_rows", torch.full((2, 4, 4096), 1 / 4096), 1e-10
    yield "tiny", 1e-9 * (1 + rand(2, 8, 16)), 2e-9
    mixed = torch.softmax(randn(2, 8, 16), -1)
    yield "one_tiny_row", torch.cat([mixed, torch.full((2, 1, 16), 1e-9)], 1), 0.5 * float(mixed.max())
    yield "constant", torch.full((2, 8, 16), 0.37), 1e-7
    yield "single_value", torch.tensor([[0.3]]), 1e-7


@all_families
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("name, x, most", list(cases()), ids=[c[0] for c in cases()])
def test_degenerate_tensors(family, bits, two_passes, name, x, most):
    weight = randn(x.shape[-1], 3, seed=1)
    quantizer = calibrated(family, [x, x], (lambda t: t @ weight) if two_passes else None, bits)
    quantizer.finish()
    out = quantizer(x)
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(quantizer.scale).all())
    assert bool((quantizer.scale > 0).all())
    assert any(same(quantizer.params(), params) for params in quantizer.candidates())
    if family is HLUQFakeQuantize and name == "one_hot":
        most = 0.07  # its top level is by design a little below the range
    assert float((out - x).abs().max()) <= most
    probe = torch.tensor([-1.0, 0.0, 1e-9, 0.5, 3.0, math.inf])
    assert bool(torch.isfinite(quantizer(probe)).all())


def test_zero_is_exact_behind_relu():
    x = torch.relu(randn(4, 30, 50))
    quantizer = calibrated(HLUQFakeQuantize, [x, 2 * x])
    assert quantizer.offset.item() == 0.0
    assert torch.equal(quantizer(x)[x == 0], torch.zeros(int((x == 0).sum())))


@all_families
def test_a_new_calibration_leaves_nothing_of_the_old(family):
    first, second = items_for(family), [x * 0.3 for x in items_for(family, count=3)]
    quantizer = calibrated(family, first, lambda t: t)
    quantizer.finish()
    observe(quantizer, second)
    quantizer.begin_search()
    for x in second:
        quantizer.score(x, lambda t: t)
    quantizer.commit()
    fresh = calibrated(family, second, lambda t: t)
    for name, value in fresh.state_dict().items():
        assert torch.equal(quantizer.state_dict()[name], value), name


@all_families
@pytest.mark.parametrize("finished", [False, True])
def test_state_dict_round_trips_into_a_fresh_quantizer(family, finished):
    items = items_for(family)
    source = calibrated(family, items)
    if finished:
        source.finish()
    target = family(quant_max=15)
    target.load_state_dict(source.state_dict())
    x = items[0] * 1.1
    assert target.quantizing and torch.equal(target(x), source(x))
    assert torch.equal(target.encode(x), source.encode(x))
    other = calibrated(family, [0.5 * x for x in items])
    other.finish()
    other.load_state_dict(source.state_dict())
    assert torch.equal(other(x), source(x))


@all_families
def test_quantizers_without_data_say_so(family):
    quantizer = family(quant_max=15)
    assert quantizer.begin_search() is False
    with pytest.raises(RuntimeError, match="has seen no data: run `calibrate`"):
        quantizer.commit()
    with pytest.raises(RuntimeError, match="`score` was called without `begin_search`"):
        quantizer.score(rand(2, 3), lambda t: t)
    loaded = family(quant_max=15)
    loaded.load_state_dict(calibrated(family, items_for(family)).state_dict())
    with pytest.raises(RuntimeError, match="keeps no sample"):
        loaded.commit()
    observe(quantizer, [torch.tensor([[0.1, math.nan]])])
    with pytest.raises(RuntimeError, match="range must be finite, got .*nan"):
        quantizer.commit()
    empty = observe(family(quant_max=15), [*items_for(family), torch.zeros(0, 4, 4)])
    empty.begin_search()
    empty.score(torch.zeros(0, 4, 4), lambda t: t)
    empty.commit()
    assert same(empty.params(), calibrated(family, items_for(family)).params())


@all_families
def test_constructor_errors(family):
    with pytest.raises(ValueError, match=f"family {family.family} is per tensor: `ch_axis` must be -1, got 1"):
        family(quant_max=15, ch_axis=1)
    with pytest.raises(TypeError, match="needs an OutputErrorObserver, got AvgMinMaxObserver"):
        family(observer=AvgMinMaxObserver, quant_max=15)
    with pytest.raises(ValueError, match=r"must be an integer in \[2, [68]\], got 9"):
        family(quant_max=511)


@learned_families
def test_the_scale_learns_with_the_factor_of_lsq(family):
    items = items_for(family)
    quantizer = calibrated(family, items)
    x = items[0]
    assert quantizer.learnable_scales() == [quantizer.scale] and quantizer.scale.requires_grad
    weight = randn(*x.shape, seed=3)
    (quantizer(x) * weight).sum().backward()
    learned = {
        name: t.detach().clone().requires_grad_() for name, t in vars(quantizer.params()).items() if "scale" in name
    }
    params = type(quantizer.params())(**{**vars(quantizer.params()), **learned})
    (family.functional.fake_quantize(x, params, 4) * weight).sum().backward()
    expected = torch.cat([t.grad for t in learned.values()]) / math.sqrt(x.numel() * 15)
    assert bool((expected != 0).all())
    torch.testing.assert_close(quantizer.scale.grad, expected)


@learned_families
def test_learning_the_scale_lowers_the_error(family):
    x = items_for(family, rows=200)[0]
    quantizer = calibrated(family, [x])
    with torch.no_grad():
        quantizer.scale.mul_(1.4)
    optimizer = torch.optim.Adam(quantizer.learnable_scales(), lr=3e-3 * float(quantizer.scale.min()))
    errors = []
    for _ in range(60):
        error = (quantizer(x) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        quantizer.keep_valid()
    assert errors[-1] < 0.98 * errors[0]


@learned_families
def test_scales_stay_positive(family):
    quantizer = calibrated(family, items_for(family))
    before = quantizer.scale.detach().clone()
    with torch.no_grad():
        quantizer.scale.neg_()
    quantizer.keep_valid()
    assert torch.equal(quantizer.scale, before)
    with torch.no_grad():
        quantizer.scale.zero_()
    quantizer.keep_valid()
    assert torch.equal(quantizer.scale, torch.full_like(before, MIN_SCALE))
    assert bool(torch.isfinite(quantizer(rand(5, 5))).all())


def test_lnq_is_static_and_rounds_its_decode_table_once():
    x = items_for(LNQFakeQuantize)[0]
    for bits in range(2, 9):
        quantizer = calibrated(LNQFakeQuantize, [x], bits=bits)
        assert quantizer.learnable_scales() == [] and quantizer.problems()
        exact, codes = quantizer.decode(torch.arange(2**bits)), torch.arange(2**bits)
        before = quantizer.encode(x)
        quantizer.finish()
        assert quantizer.problems() == []
        levels = quantizer.levels.clone()
        quantizer.finish()
        assert torch.equal(quantizer.levels, levels) and torch.equal(quantizer.decode(codes), levels)
        units = (levels.double() / quantizer.scale.double() * 2**lnq.DECODE_FRACTION_BITS).numpy()
        assert abs(units - units.round()).max() < 1e-2 and levels[0] == 0 and levels[-1] == quantizer.scale
        assert float((levels - exact).abs().max() / quantizer.scale) <= 2.0 ** -(lnq.DECODE_FRACTION_BITS + 1) * 1.01
        assert torch.equal(quantizer.encode(levels), codes) and torch.equal(quantizer.encode(x), before)
        assert torch.equal(quantizer(x), levels[before])


@all_families
def test_the_table_is_what_it_computes(family):
    items = items_for(family)
    quantizer = calibrated(family, items)
    for _ in ("calibrated", "in its final form"):
        table = quantizer.table()
        ranks = (items[0].reshape(-1, 1) >= table.boundaries).sum(1).view(items[0].shape)
        assert torch.equal(quantizer(items[0]), table.levels[ranks])
        assert torch.equal(quantizer.encode(items[0]), table.codes[ranks])
        assert torch.equal(quantizer.decode(table.codes), table.levels)
        assert sorted(table.codes.tolist()) == list(range(2**quantizer.bits))
        quantizer.finish()
