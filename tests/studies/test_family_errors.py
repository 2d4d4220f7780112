# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ahcq_plugin.functional import hluq, uniform
from ahcq_plugin.studies.family_errors import Contest, draw_families, family_errors
from ahcq_plugin.zoo.sam import box_forward


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x_hat, x, weight):
    return float(((x_hat - x) @ weight).square().mean() / (x @ weight).square().mean())


def test_errors_are_those_of_the_published_parameters():
    """One item, so that mean ends are ends: uniform and HLUQ written out here give the same errors."""
    x = nn.functional.gelu(2 * randn(64, 24, seed=0))
    weight = randn(24, 6, seed=1)
    contest = Contest(15, "post_act")
    contest.observe(x)
    assert contest.begin_search()
    contest.score(x, lambda t: t @ weight)
    contest.commit()
    errors = contest.errors
    params = uniform.qparams_from_range(x.min(), x.max(), 4)
    plain = uniform.decode(uniform.encode(x, params, 4), params, 4)
    assert errors["uniform"] == pytest.approx(relative_error(plain, x, weight), rel=1e-4)
    span = x.max() - x.min()
    hybrid = []
    for share in (0.1, 0.3, 0.5):
        for levels in (2, 4, 8):
            step = (1 - share) * span / (15 * (1 - levels / 16))
            p = hluq.HLUQParams(x.min(), share * span, step, torch.tensor([levels]))
            hybrid.append(relative_error(hluq.decode(hluq.encode(x, p, 4), p, 4), x, weight))
    assert errors["HLUQ"] == pytest.approx(min(hybrid), rel=1e-4)
    assert errors["HLUQ, searched range"] <= errors["HLUQ"] and errors["uniform, searched range"] <= errors["uniform"]
    assert "LNQ" not in errors and {"AGQ", "LNQ"} <= set(Contest(15, "softmax").rivals)


def test_every_place_is_judged_and_drawn(tiny_sam, tiny_items, tmp_path):
    means = draw_families(tiny_sam, tiny_items, tmp_path, forward=box_forward)
    assert (tmp_path / "families.png").read_bytes().startswith(b"\x89PNG")
    assert means["post_act, uniform"] == pytest.approx(1) and means["softmax, uniform"] == pytest.approx(1)
    assert all(0 < value < 100 for value in means.values())
    assert means["softmax, LNQ, steeper tables"] <= means["softmax, LNQ"] < 1
    assert means["softmax, uniform, searched range"] <= 1


def test_a_place_per_quantizer(tiny_sam, tiny_items):
    blocks = len(tiny_sam.image_encoder.blocks)
    errors = family_errors(tiny_sam, tiny_items[:1], box_forward)
    assert {len(values) for values in errors["post_act"].values()} == {blocks + 2}
    assert {len(values) for values in errors["softmax"].values()} == {blocks + 7}
