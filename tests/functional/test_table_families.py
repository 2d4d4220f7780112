# SPDX-License-Identifier: Apache-2.0
"""Properties of the codes and levels that all families with a table share, and float64 oracles from their formulas."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.functional import agq, power_of_two

_SPEC = importlib.util.spec_from_file_location("table_cases", Path(__file__).with_name("table_cases.py"))
_cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_cases)
FAMILIES, cases, example, no_offset, number = (
    _cases.FAMILIES,
    _cases.cases,
    _cases.example,
    _cases.no_offset,
    _cases.number,
)
scale_names, values_around = _cases.scale_names, _cases.values_around


@given(cases())
def test_every_code_is_reached_and_round_trips(case):
    codes = torch.arange(2**case.bits)
    levels = case.decode(codes)
    assert len(levels.unique()) == 2**case.bits and bool(torch.isfinite(levels).all())
    assert float(levels.min()) == 0.0
    assert torch.equal(case.encode(levels), codes)
    assert torch.equal(case.table.codes.sort().values, codes)


@given(cases(offsets=st.one_of(no_offset, st.floats(-1, 1))))
def test_decode_of_encode_is_idempotent_monotone_and_in_range(case):
    x = values_around(case.table).sort().values
    codes = case.encode(x)
    assert codes.dtype == torch.int64 and int(codes.min()) >= 0 and int(codes.max()) < 2**case.bits
    out = case.decode(codes)
    assert bool((out.diff() >= 0).all())
    assert torch.equal(case.decode(case.encode(out)), out)


@given(cases())
def test_a_value_on_a_boundary_takes_the_upper_level(case):
    table = case.table
    assert bool((table.boundaries.diff() > 0).all()) and bool((table.levels.diff() > 0).all())
    assert bool((table.boundaries > table.levels[:-1]).all()) and bool((table.boundaries < table.levels[1:]).all())
    below = torch.nextafter(table.boundaries, torch.tensor(-math.inf))
    assert torch.equal(case.decode(case.encode(table.boundaries)), table.levels[1:])
    assert torch.equal(case.decode(case.encode(below)), table.levels[:-1])


@given(cases())
def test_values_beyond_the_range_saturate(case):
    table = case.table
    high = torch.tensor([float(table.top) * 1.01, 3e38, math.inf])
    assert torch.equal(case.decode(case.encode(high)), table.levels[-1].expand(3))
    assert torch.equal(case.decode(case.encode(torch.tensor([-1e-30, -5.0, -math.inf]))), torch.zeros(3))


@settings(max_examples=60)
@given(
    cases(offsets=st.sampled_from([0.0, -0.17, 0.3])),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([7, 2**14, 2**17 + 3]),
)
def test_forward_is_decode_of_encode_bit_for_bit(case, dtype, size):
    """Small tensors go by binary search, large ones by buckets, and the largest in several chunks."""
    values = values_around(case.table)
    x = values.repeat(-(-size // len(values)))[:size].to(dtype)
    out = case.fake_quantize(x)
    assert out.dtype == dtype and torch.equal(out, case.decode(case.encode(x)).to(dtype))


def oracle(case, x):
    """Codes of x (float64 numpy) from the family's formula, and how far each is from a tie (0 .. 0.5)."""
    p, top = case.params, 2**case.bits - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        if case.family == "lnq":
            a, clip = p.shape_factor.double().item(), p.clip.double().item()
            place = np.clip(np.log1p(a * np.maximum(x, 0)) / np.log1p(a * clip), 0, 1) * top
            return np.rint(place), np.abs(place - np.floor(place) - 0.5)
        if case.family in ("agq", "power_of_two"):
            tau = p.tau.item() if case.family == "agq" else 1
            place = -tau * np.log2(np.maximum(x, 1e-300) / p.scale.double().item())
            return np.clip(np.rint(place), 0, top), np.abs(place - np.floor(place) - 0.5)
        log, step, split = p.scale_log.double().item(), p.scale_uniform.double().item(), p.log_levels.item()
        place = -np.log2(np.maximum(x, 1e-300) / log)
        powers = np.where(np.rint(place) >= split, split, np.maximum(np.rint(place), 0))
        steps = (x - log) / step
        count = np.clip(np.rint(steps), 0, top - split)
        codes = np.where(x < log, powers, np.where(count == 0, 0, split + count))
        place = np.where(x < log, place, steps)
        return codes, np.abs(place - np.floor(place) - 0.5)


@given(cases(), st.integers(0, 2**31))
def test_codes_are_those_of_the_formula(case, seed):
    x = values_around(case.table, count=1000, seed=seed)
    x = x[torch.isfinite(x)]
    codes, distance = oracle(case, x.double().numpy())
    clear = torch.from_numpy(distance > 1e-4)
    assert int(clear.sum()) > 500
    assert torch.equal(case.encode(x)[clear], torch.from_numpy(codes.astype(np.int64))[clear])


def expected_levels(case):
    """Level of each code in float64, from the formula."""
    p, codes = case.params, np.arange(2**case.bits, dtype=np.float64)
    if case.family == "lnq":
        a, clip = p.shape_factor.double().item(), p.clip.double().item()
        return ((1 + a * clip) ** (codes / codes[-1]) - 1) / a
    if case.family == "hluq":
        split = p.log_levels.item()
        power = p.scale_log.double().item() * 2.0**-codes
        uniform = p.scale_log.double().item() + (codes - split) * p.scale_uniform.double().item()
        return np.where(codes < split, power, np.where(codes == split, 0, uniform))
    levels = p.scale.double().item() * 2.0 ** (-codes / (p.tau.item() if case.family == "agq" else 1))
    return np.where(codes == codes[-1], 0, levels)


@given(cases())
def test_levels_are_those_of_the_formula(case):
    decoded = case.decode(torch.arange(2**case.bits)).double().numpy()
    np.testing.assert_allclose(decoded, expected_levels(case), rtol=2e-7 if case.family != "lnq" else 1e-6, atol=1e-30)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape_and_stride(family):
    case = example(family)
    base = torch.rand(60, 50, 30, generator=torch.Generator().manual_seed(0))
    for x in (base, base.transpose(0, 2), base[:, ::2, 1], base[3, 4, 5], base[:0], base[..., :1].expand(60, 50, 7)):
        copy = x.clone(memory_format=torch.contiguous_format)
        leaf = x.detach().requires_grad_()
        out = case.fake_quantize(leaf)
        out.backward(torch.ones(()).expand(out.shape))
        assert out.shape == x.shape and torch.equal(out, case.decode(case.encode(copy)))
        assert torch.equal(leaf.grad, (copy <= case.table.top.item()).float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [5, 2**16])
def test_nan_stays_visible_and_spoils_nothing_else(family, size):
    case = example(family)
    x = torch.rand(size, generator=torch.Generator().manual_seed(0))
    clean = case.fake_quantize(x)
    bad = x.clone()
    bad[2], bad[3], bad[4] = math.nan, -math.nan, math.inf
    out = case.fake_quantize(bad)
    assert out[2:4].isnan().all() and out[4] == case.table.levels[-1]
    assert torch.equal(out[:2], clean[:2]) and torch.equal(out[5:], clean[5:])
    assert case.decode(case.encode(bad))[2] == case.table.levels[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_name_the_value(family):
    module, case = FAMILIES[family], example(family)
    for bits in (1, 9, 4.0, True):
        with pytest.raises(ValueError, match=rf"must be an integer in \[2, [68]\], got {bits}"):
            module.encode(torch.zeros(1), case.params, bits)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 15\] for 4 bits, got \[-1, 16\]"):
        case.decode(torch.tensor([-1, 16]))
    for name in scale_names(case) or ("clip", "shape_factor"):
        for value, message in ((0.0, "positive and finite, got 0.0"), (math.nan, "got nan"), (math.inf, "got inf")):
            with pytest.raises(ValueError, match=f"`{name}` must be .*{message}"):
                module.encode(torch.zeros(1), type(case.params)(**{**vars(case.params), name: number(value)}), 4)
        with pytest.raises(ValueError, match=rf"`{name}` must hold one number .* got shape \(2,\)"):
            module.encode(torch.zeros(1), type(case.params)(**{**vars(case.params), name: torch.ones(2)}), 4)


def test_families_that_run_out_of_float32_say_so():
    with pytest.raises(ValueError, match=r"`bits` of power_of_two must be an integer in \[2, 6\], got 7: float32"):
        power_of_two.encode(torch.zeros(1), power_of_two.PowerOfTwoParams(number(0.0), number(1.0)), 7)
    assert [agq.allowed_taus(bits) for bits in (2, 6, 7, 8)] == [(1, 2, 4), (1, 2, 4), (2, 4), (4,)]
    with pytest.raises(ValueError, match=r"`tau` must be one of \(4,\) for 8 bits, got 2"):
        agq.encode(torch.zeros(1), agq.AGQParams(number(1.0), torch.tensor([2])), 8)
    with pytest.raises(ValueError, match=r"`tau` must be one of \(1, 2, 4\) for 4 bits, got 3"):
        agq.encode(torch.zeros(1), agq.AGQParams(number(1.0), torch.tensor([3])), 4)
