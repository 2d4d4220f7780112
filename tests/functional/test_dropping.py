# SPDX-License-Identifier: Apache-2.0
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional import pieces, uniform
from ahcq_plugin.functional.dropping import Drop, mask

_SPEC = importlib.util.spec_from_file_location("table_cases", Path(__file__).with_name("table_cases.py"))
_cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_cases)
FAMILIES, cases, scale_names, values_around = _cases.FAMILIES, _cases.cases, _cases.scale_names, _cases.values_around


def drawn(like, share):
    """The mask of a random drop."""
    drop = Drop.draw(like, share)
    return mask(drop.dice, drop.threshold)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.997])
def test_share_of_ones(share):
    torch.manual_seed(0)
    chosen = drawn(torch.empty(1000, 1001), share)
    assert chosen.shape == (1000, 1001) and set(chosen.unique().tolist()) <= {0.0, 1.0}
    assert float(chosen.mean()) == pytest.approx(share, abs=0.0035)  # 1/512 of rounding, 3 sigma
    assert share != 0.0 or not chosen.any()


def test_all_ones_need_no_dice():
    assert Drop.draw(torch.empty(9), 1.0) is None


def test_neighbours_are_independent():
    torch.manual_seed(1)
    chosen = drawn(torch.empty(2**20), 0.5) - 0.5
    for lag in (1, 2, 4, 7, 8, 64):
        assert abs(float((chosen[lag:] * chosen[:-lag]).mean())) < 0.001, lag  # 4 sigma


def test_layout_follows_the_tensor():
    """A permuted tensor gets dice of its own layout, and every element of it is random."""
    torch.manual_seed(2)
    x = torch.empty(4, 64, 8, 32).permute(0, 2, 1, 3)
    drop = Drop.draw(x, 0.5)
    assert drop.dice.stride() == x.stride() and 0.45 < float(drawn(x, 0.5).mean()) < 0.55
    plain = drop.dice_like(torch.empty(x.shape))
    assert plain.is_contiguous() and torch.equal(plain, drop.dice)
    assert drawn(torch.empty(3, 5)[:, ::2], 0.5).shape == (3, 3)
    assert drawn(torch.empty(0, 4), 0.5).shape == (0, 4)


def test_seeded():
    torch.manual_seed(3)
    first = drawn(torch.empty(77), 0.3)
    torch.manual_seed(3)
    assert torch.equal(drawn(torch.empty(77), 0.3), first)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_bad_share(share):
    with pytest.raises(ValueError, match="share"):
        Drop.draw(torch.empty(2), share)


def outcome(quantize, x, scales, upstream):
    """Value and all gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, *scales)]
    out = quantize(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]


def assert_drops_within(quantize, x, scales, drop):
    """``quantize(x, *scales, drop)``: the chosen elements as without a drop, the others as they were; gradients too."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    chosen = mask(drop.dice, drop.threshold, x.dtype)
    got = outcome(lambda *leaves: quantize(*leaves, drop), x, scales, upstream)
    quantized, straight, *_ = outcome(lambda *leaves: quantize(*leaves, None), x, scales, upstream)
    _, _, *scale_grads = outcome(lambda *leaves: quantize(*leaves, None), x, scales, upstream * chosen)
    assert torch.equal(got[0], torch.where(chosen > 0, quantized, x))
    assert torch.equal(got[1], torch.where(chosen > 0, straight, upstream))
    for mine, wanted in zip(got[2:], scale_grads, strict=True):
        assert (mine is None) == (wanted is None)
        assert mine is None or torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "permuted", "strided", "empty"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_drops_inside_the_uniform_quantizer(monkeypatch, dtype, layout, per_channel, share):
    monkeypatch.setattr(pieces, "SIZE", 5)
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = {"plain": x, "permuted": x.permute(1, 0, 2), "strided": x[:, ::2], "empty": x[:, :0]}[layout]
    scale = torch.linspace(0.1, 0.4, 8) if per_channel else torch.tensor([0.2])
    zero_point = torch.arange(len(scale)) % 16

    def quantize(x, scale, drop):
        return uniform.fake_quantize(x, uniform.UniformParams(scale, zero_point), 4, 0.5, drop)

    torch.manual_seed(4)
    assert_drops_within(quantize, x, [scale], Drop.draw(x, share))


@given(
    cases(offsets=st.sampled_from([0.0, -0.25])),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([0.0, 0.4]),
    st.booleans(),
)
def test_drops_inside_the_tables(case, dtype, share, permuted):
    x = values_around(case.table)
    x = x[torch.isfinite(x)].to(dtype)
    x = x[torch.isfinite(x)]
    x = torch.stack([x, x.flip(0)], 1).T if permuted else x
    names = scale_names(case)

    def quantize(x, *scales_and_drop):
        *scales, drop = scales_and_drop
        params = type(case.params)(**{**vars(case.params), **dict(zip(names, scales, strict=True))})
        return FAMILIES[case.family].fake_quantize(x, params, case.bits, drop=drop)

    torch.manual_seed(5)
    assert_drops_within(quantize, x, [getattr(case.params, n) for n in names], Drop.draw(x, share))
