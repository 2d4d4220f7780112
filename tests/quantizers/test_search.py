# SPDX-License-Identifier: Apache-2.0
"""The search for parameters: observer, candidates, scores."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from ahcq_plugin.functional import lnq, uniform
from ahcq_plugin.quantizers.agq import AGQFakeQuantize
from ahcq_plugin.quantizers.hluq import HLUQFakeQuantize
from ahcq_plugin.quantizers.lnq import LNQFakeQuantize
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.power_of_two import PowerOfTwoFakeQuantize
from ahcq_plugin.quantizers.sampling import SCORED_ELEMENTS, spread_rows
from ahcq_plugin.quantizers.uniform import UniformFakeQuantize

_SPEC = importlib.util.spec_from_file_location("table_helpers", Path(__file__).with_name("table_helpers.py"))
_helpers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_helpers)
all_families, learned_families = _helpers.all_families, _helpers.learned_families
calibrated, items_for, observe = _helpers.calibrated, _helpers.items_for, _helpers.observe
rand, randn, same = _helpers.rand, _helpers.randn, _helpers.same


@all_families
@pytest.mark.parametrize("bits", [4, 6])
def test_search_takes_the_candidate_that_brute_force_takes(family, bits):
    items = items_for(family, count=3)
    weight = randn(40, 5, seed=7) * torch.linspace(0.1, 3, 40)[:, None]
    quantizer = observe(family(quant_max=2**bits - 1), items)
    candidates = quantizer.candidates()
    power = 2 if family is HLUQFakeQuantize else 2.4
    totals = []
    for params in candidates:
        total = 0.0
        for x in items:
            x_hat = family.functional.decode(family.functional.encode(x, params, bits), params, bits)
            total += float(((x_hat.double() @ weight.double() - x.double() @ weight.double()).abs() ** power).mean())
        totals.append(total)
    best = min(range(len(totals)), key=totals.__getitem__)
    quantizer.begin_search()
    for x in items:
        quantizer.score(x, lambda t: t @ weight)
    torch.testing.assert_close(
        quantizer.activation_post_process.scores.errors, torch.tensor(totals).double(), rtol=1e-3, atol=1e-12
    )
    quantizer.commit()
    assert same(quantizer.params(), candidates[best]) and quantizer.activation_post_process.scores is None
    # the test could fail: another item, another error or no product would lead elsewhere
    assert sorted(totals)[1] > totals[best] * (1 + 1e-6)


@all_families
def test_product_decides(family):
    """Two products over the same tensor lead to different parameters, so the output's error is what counts."""
    items = items_for(family, rows=64)
    large = lambda t: torch.relu(t - 0.6 * items[0].max())  # noqa: E731
    small = lambda t: torch.minimum(t, 0.02 * items[0].max())  # noqa: E731
    assert not same(calibrated(family, items, large).params(), calibrated(family, items, small).params())


def test_candidates_are_the_published_ones():
    quantizer = observe(HLUQFakeQuantize(quant_max=15), [torch.tensor([[0.0, 1.0]]), torch.tensor([[-2.0, 5.0]])])
    found = [(p.scale_log.item(), p.scale_uniform.item(), p.log_levels.item()) for p in quantizer.candidates()]
    span = 3 + 1
    expected = [(a * span, (1 - a) * span / (15 * (1 - n / 16)), n) for a in (0.1, 0.3, 0.5) for n in (2, 4, 8)]
    assert [n for _, _, n in found] == [n for _, _, n in expected]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert all(p.offset.item() == -1.0 for p in quantizer.candidates())
    for bits, levels in {2: {1, 2}, 3: {1, 2, 4}, 5: {4, 8, 16}, 6: {8, 16}, 7: {16}, 8: {16}}.items():
        quantizer = observe(HLUQFakeQuantize(quant_max=2**bits - 1), [rand(3, 3)])
        assert {p.log_levels.item() for p in quantizer.candidates()} == levels
    quantizer = observe(LNQFakeQuantize(quant_max=15), [torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 0.2]])])
    params = quantizer.candidates()
    shapes = sorted({p.shape_factor.item() for p in params})
    assert shapes == pytest.approx([0.001, 0.1, 1, 5, 10, 20, 50, 100, 200, 500, 2000, 5000])
    clips = sorted({p.clip.item() for p in params})
    assert clips[0] == pytest.approx(0.025) and clips[-1] == 0.5 and len(params) == len(shapes) * len(clips)
    quantizer = observe(
        PowerOfTwoFakeQuantize(quant_max=15), [torch.tensor([[-1.0, 1.0]]), torch.tensor([[-2.0, 5.0]])]
    )
    tops = [p.scale.item() for p in quantizer.candidates()]
    assert max(tops) == 4.5 and min(tops) == pytest.approx(0.45)
    assert all(p.offset.item() == -1.5 for p in quantizer.candidates())
    params = observe(
        AGQFakeQuantize(quant_max=15), [torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 0.2]])]
    ).candidates()
    assert max(p.scale.item() for p in params) == 0.5
    assert min(p.scale.item() for p in params) == pytest.approx(0.025)
    taus = {
        b: {p.tau.item() for p in observe(AGQFakeQuantize(quant_max=2**b - 1), [rand(3)]).candidates()}
        for b in (4, 7, 8)
    }
    assert taus == {4: {1, 2, 4}, 7: {2, 4}, 8: {4}}


def searched_uniform(items, product=None, bits=4):
    quantizer = observe(UniformFakeQuantize(OutputErrorObserver, quant_max=2**bits - 1), items)
    if product is not None:
        quantizer.begin_search()
        for x in items:
            quantizer.score(x, product)
    quantizer.commit()
    return quantizer


def squared_output_error(params, items, weight, bits=4):
    decoded = [uniform.decode(uniform.encode(x, params, bits), params, bits).double() for x in items]
    return sum(float(((d - x) @ weight.double()).square().mean()) for d, x in zip(decoded, items, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_uniform_range_is_searched_by_the_output_error(bits, shift):
    """Columns with outliers hardly reach the output: ranges that saturate them win over the mean ends."""
    items = [randn(50, 8, seed=k) * torch.tensor([1.0] * 7 + [6.0]) + shift for k in range(3)]
    weight = randn(8, 5, seed=9) * torch.tensor([1.0] * 7 + [0.001])[:, None]
    lo, hi = (sum(float(end(x)) for x in items) / 3 for end in (torch.min, torch.max))
    shares = [0.2 ** (k / 8) for k in range(9)]
    tried = {
        (i, j): uniform.qparams_from_range(torch.tensor([lo * low]), torch.tensor([hi * high]), bits)
        for i, low in enumerate(shares)
        for j, high in enumerate(shares)
    }
    errors = {key: squared_output_error(params, items, weight, bits) for key, params in tried.items()}
    quantizer = searched_uniform(items, lambda t: t @ weight, bits)
    found = squared_output_error(quantizer.params(), items, weight, bits)
    assert found == pytest.approx(min(errors.values()), rel=1e-4) and found < 0.7 * errors[0, 0]
    assert torch.equal(quantizer.calculate_qparams()[1], quantizer.zero_point)
    assert quantizer.learnable_scales() == [quantizer.scale]


def test_a_uniform_range_of_one_sign_has_one_end_to_search():
    quantizer = observe(UniformFakeQuantize(OutputErrorObserver, quant_max=15), [rand(4, 6)])
    assert len(quantizer.candidates()) == 9 and all(p.zero_point.item() == 0 for p in quantizer.candidates())
    constant = searched_uniform([torch.zeros(3, 3)], lambda t: t)
    constant.enable_fake_quant()
    assert torch.equal(constant(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_uniform_search_is_per_tensor_and_needs_two_passes_for_products():
    with pytest.raises(ValueError, match="family uniform is per tensor: `ch_axis` must be -1, got 2"):
        UniformFakeQuantize(OutputErrorObserver, quant_max=15, ch_axis=2)
    assert UniformFakeQuantize(quant_max=15).begin_search() is False
    heavy = [torch.cat([randn(4000, seed=2), torch.tensor([40.0])]).view(1, -1)]
    own = searched_uniform(heavy)
    assert float(own.scale) < 0.7 * float(uniform.qparams_from_range(heavy[0].min(), heavy[0].max(), 4).scale)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_hluq_with_a_searched_range_tries_the_published_candidates_first(bits):
    items = [torch.nn.functional.gelu(randn(60, 12, seed=k) * torch.linspace(0.3, 8, 12)) for k in range(2)]
    weight = 0.1 ** torch.arange(12.0)[:, None]  # large values hardly count
    plain, searched = (
        observe(HLUQFakeQuantize(quant_max=2**bits - 1, search_range=flag), items) for flag in (False, True)
    )
    published = plain.candidates()
    assert all(same(a, b) for a, b in zip(published, searched.candidates(), strict=False))
    assert len(searched.candidates()) == 14 * len(published)
    errors = []
    for quantizer in (plain, searched):
        quantizer.begin_search()
        for x in items:
            quantizer.score(x, lambda t: t @ weight)
        errors.append(float(quantizer.activation_post_process.scores.errors.min()))
        quantizer.commit()
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_lnq_follows_attention_over_thousands_of_tokens(bits):
    """Probabilities near 1 / 4096 among a few large ones: the paper's steepest factor, 200, is not steep enough; at 8
    bits no candidate has levels that the hardware's table could not tell apart."""
    scores = 1.5 * randn(4, 16, 4096)
    scores[:, ::5, 7] += 12
    attention, values = scores.softmax(-1), randn(4, 4096, 8, seed=1)
    quantizer = observe(LNQFakeQuantize(quant_max=2**bits - 1), [attention])
    quantizer.begin_search()
    quantizer.score(attention, lambda t: t @ values)
    pairs = list(zip(quantizer.candidates(), quantizer.activation_post_process.scores.errors.tolist(), strict=True))
    published, all_of_them = (
        min(error for params, error in pairs if params.shape_factor.item() <= most) for most in (200, math.inf)
    )
    assert all_of_them < (0.5 if bits == 4 else 1.01) * published
    for params, _ in pairs:
        assert len(lnq.integer_levels(params, bits).unique()) == 2**bits
    assert (len(pairs) < 12 * 14) == (bits == 8)


@all_families
def test_only_spread_rows_of_large_tensors_are_scored(family):
    seen = []
    x = items_for(family, count=1, rows=4096, columns=128)[0]

    def product(t):
        seen.append(t.shape)
        return t.sum(-1)

    quantizer = calibrated(family, [x], product)
    assert set(seen) == {(2, 256, 128)}  # 2^16 elements
    assert len(seen) == 1 + len(quantizer.candidates())


def test_fewer_rows_are_scored_where_the_product_is_large():
    seen = []
    x, keys = randn(2, 1024, 16), randn(2, 16, 2048, seed=1)
    searched_uniform([x], lambda t: (seen.append(t.shape[1]), t @ keys)[1])
    assert seen == [1024] + [128] * 82  # 2 x 128 x 2048 outputs are 2^19; the wanted product and 81 candidates


@pytest.mark.parametrize(
    "shape", [(3, 5), (2**10, 2**10), (300, 196, 196), (2, 196, 4096), (4, 1, 2**18), (2**19,), (64, 64, 3072)]
)
def test_spread_rows(shape):
    length = shape[-2] if len(shape) > 1 else 1
    x = torch.arange(length).view(-1, 1).expand(shape) if len(shape) > 1 else torch.zeros(shape)
    rows = spread_rows(x)
    assert rows.shape[:-2] == shape[:-2] and rows.shape[-1] == shape[-1]
    if len(shape) == 1:
        return
    taken = rows.reshape(-1, rows.shape[-2], shape[-1])[0, :, 0]
    per_row = math.prod(shape) // length
    assert len(taken) == min(length, max(1, SCORED_ELEMENTS // per_row)) and bool((taken.diff() > 0).all())
    if len(taken) > 2:
        # as good as evenly: no part of the rows is left out, and no period of the rows is met always at the same place
        assert int(taken.diff().max()) <= 2 * length / len(taken) + 1
        assert len(taken) < 14 or length % 14 or len((taken % 14).unique()) > 7


def test_sample_is_small_spread_and_of_all_calls():
    observer = OutputErrorObserver(quant_max=15)
    columns = torch.arange(64.0).expand(4096, 64)
    observer(columns)
    assert len(observer.sample) <= observer.most_per_call and len(observer.sample.unique()) == 64
    observer.reset()
    for call in range(100):
        observer(torch.full((8192,), float(call)))
    counts = torch.bincount(observer.sample.long(), minlength=100)
    assert observer.most // 4 <= len(observer.sample) <= observer.most
    assert int(counts.min()) > 0 and int(counts.max()) <= 2 * int(counts.min())
    observer.reset()
    assert len(observer.sample) == 0
    observer(torch.arange(10.0))
    assert observer.sample.tolist() == list(range(10)) and observer.largest.item() == 9.0
    assert "sample" not in observer.state_dict()


@all_families
def test_without_a_second_pass_the_own_error_decides(family):
    items = items_for(family)
    quantizer = observe(family(quant_max=15), items)
    values = torch.cat([x.reshape(-1) for x in items])
    assert torch.equal(quantizer.activation_post_process.sample, values)
    functional = family.functional
    errors = [
        float(((functional.decode(functional.encode(values, p, 4), p, 4) - values).double().abs() ** 2.4).mean())
        for p in quantizer.candidates()
    ]
    best = quantizer.candidates()[min(range(len(errors)), key=errors.__getitem__)]
    quantizer.commit()
    assert same(quantizer.params(), best)


@all_families
def test_of_equal_candidates_the_first_is_taken(family):
    quantizer = observe(family(quant_max=15), items_for(family))
    first = quantizer.candidates()[0]
    assert same(calibrated(family, items_for(family), lambda t: torch.zeros(3)).params(), first)


def test_a_candidate_whose_product_is_not_a_number_loses():
    calls = []

    def product(t):
        calls.append(t)
        return t * math.nan if len(calls) == 2 else t * 0 + len(calls)

    x = rand(4, 8)
    quantizer = calibrated(HLUQFakeQuantize, [x], product)
    assert same(quantizer.params(), quantizer.candidates()[1])


@all_families
def test_an_abandoned_search_does_not_count(family):
    items = items_for(family)
    quantizer = observe(family(quant_max=15), items)
    quantizer.begin_search()
    quantizer.score(torch.ones(2, 40), lambda t: t)
    observe(quantizer, items)
    quantizer.commit()
    assert same(quantizer.params(), calibrated(family, items).params())


def test_observer_knows_the_largest_value_of_all_calls():
    observer = OutputErrorObserver(quant_max=15)
    for value in (0.2, 0.9, 0.4):
        observer(torch.tensor([0.0, value]))
    lo, hi, largest = observer.statistics()
    assert (lo.item(), hi.item(), largest.item()) == (0.0, pytest.approx(0.5), pytest.approx(0.9))
