# SPDX-License-Identifier: Apache-2.0
"""Roles of gated MLPs, ``w2(act(w1(x)) * w3(x))`` in all its spellings, and of what only looks like one."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import find_roles, find_units, trace_unit
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.ptq.score import linear_product
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES

WIDTH, HIDDEN = 6, 8


class Gated(nn.Module):
    """``product(self, x)`` makes the hidden tensor."""

    def __init__(self, product) -> None:
        super().__init__()
        self.product = product
        self.gate, self.up, self.both = (nn.Linear(WIDTH, n) for n in (HIDDEN, HIDDEN, 2 * HIDDEN))
        self.down, self.act, self.glu, self.drop = nn.Linear(HIDDEN, WIDTH), nn.SiLU(), nn.GLU(), nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.product(self, x)))


def packed(self: Gated, x: Tensor) -> Tensor:
    a, b = self.both(x).chunk(2, dim=-1)
    return F.silu(a) * b


def packed_sigmoid(self: Gated, x: Tensor) -> Tensor:
    """Both factors come from one Linear, and yet this is no SiLU."""
    h = self.both(x)
    return h[..., :HIDDEN] * h[..., HIDDEN:].sigmoid()


def packed_gate_last(self: Gated, x: Tensor) -> Tensor:
    parts = self.both(x).split(HIDDEN, -1)
    return torch.mul(parts[0], self.act(parts[1]))


SPELLINGS = {
    "two Linears": (lambda m, x: m.act(m.gate(x)) * m.up(x), ("gate", "up")),
    "the gate last": (lambda m, x: m.up(x).mul(F.gelu(m.gate(x))), ("gate", "up")),
    "a sigmoid": (lambda m, x: torch.sigmoid(m.gate(x)) * m.up(x), ("gate", "up")),
    "SiLU written out": (lambda m, x: (lambda g: g * g.sigmoid())(m.gate(x)) * m.up(x), ("gate", "up")),
    "one Linear, chunked": (packed, ("both",)),
    "one Linear, split": (packed_gate_last, ("both",)),
    "one Linear, sliced": (packed_sigmoid, ("both",)),
    "GLU as function": (lambda m, x: F.glu(m.both(x)), ("both",)),
    "GLU as module": (lambda m, x: m.glu(m.both(x)), ("both",)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gate_and_up_share_one_site_and_their_product_has_its_role(spelling):
    product, layers = SPELLINGS[spelling]
    sites = find_roles(trace_unit(Gated(product), "mlp"))
    assert sorted((site.role, *sorted(site.layers)) for site in sites) == [("gated_act", "down"), ("mlp_in", *layers)]


PLAIN = {
    "SiLU written out": lambda m, x: (lambda h: h * torch.sigmoid(h))(m.gate(x)),
    "quick GELU": lambda m, x: (lambda h: torch.sigmoid(1.702 * h) * h)(m.gate(x)),
}


@pytest.mark.parametrize("spelling", PLAIN)
def test_x_times_its_own_sigmoid_is_an_activation(spelling):
    sites = find_roles(trace_unit(Gated(PLAIN[spelling]), "mlp"))
    assert [(site.role, site.layers) for site in sites] == [("mlp_in", ("gate",)), ("post_act", ("down",))]


def test_layer_scale_on_an_activation_is_no_gate():
    sites = find_roles(trace_unit(Gated(lambda m, x: m.act(m.gate(x)) * m.scale), "mlp"))
    assert [(site.role, site.layers) for site in sites] == [("mlp_in", ("gate",)), ("other_in", ("down",))]


def test_a_plain_product_is_no_gate():
    sites = find_roles(trace_unit(Gated(lambda m, x: m.gate(x) * m.up(x)), "mlp"))
    assert [(site.role, site.layers) for site in sites] == [("other_in", ("gate", "up")), ("other_in", ("down",))]


@pytest.mark.parametrize(
    ("name", "mlp_in", "last"),
    [
        ("vit_giant_patch14_dinov2", ("mlp.fc1",), "gated_act"),
        ("eva02_tiny_patch14_224", ("mlp.fc1",), "gated_act"),
        ("eva02_base_patch14_224", ("mlp.fc1_g", "mlp.fc1_x"), "other_in"),  # a norm behind the product
    ],
)
def test_roles_of_timm_models(name, mlp_in, last):
    model = timm.create_model(name, img_size=28, depth=1, embed_dim=32, num_heads=2).eval()
    sites = find_roles(trace_unit(model.blocks[0], "block"))
    by_role = {site.role: site.layers for site in sites}
    assert by_role["mlp_in"] == mlp_in and by_role[last] == ("mlp.fc2",) and "post_act" not in by_role


def test_a_gated_mlp_with_a_norm_is_a_unit():
    class Block(Gated):
        def __init__(self) -> None:
            super().__init__(SPELLINGS["two Linears"][0])
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(self.norm(x))

    assert find_units(nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 2)).eval()) == ["0", "1"]


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_the_default_family_of_a_gated_product_loses_least(activation):
    """The error of the following Linear at 4 bits, channels of different widths: CAG halves it, HLUQ, made for what
    follows GELU, gains nothing over a uniform quantizer."""
    recipe = Recipe.from_config("ahcq")
    assert (recipe.family("gated_act"), recipe.family("post_act")) == ("cag", "hluq")
    assert Recipe.from_config("qdrop").family("gated_act") == "uniform"
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 512, 64, generator=generator)
    x = activation(gate) * up * torch.randn(64, generator=generator).exp()
    product = linear_product((nn.Linear(64, 32),))
    errors = {}
    for family in ("uniform", "hluq", "cag"):
        quantizer = ACTIVATION_FAMILIES[family](quant_max=15, role="gated_act")
        quantizer.enable_observer()
        quantizer(x)
        if quantizer.begin_search():
            quantizer.score(x, product)
        quantizer.enable_observer(False)
        quantizer.commit()
        quantizer.finish()
        quantizer.enable_fake_quant()
        with torch.no_grad():
            errors[family] = float((product(quantizer(x)) - product(x)).norm() / product(x).norm())
    assert errors["cag"] < 0.6 * errors["uniform"] and errors["hluq"] > 0.95 * errors["uniform"], errors
