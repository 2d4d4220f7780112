# SPDX-License-Identifier: Apache-2.0
"""Quantizers of all families with a table, and values that are hard for them, for the tests of what they share."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from ahcq_plugin.functional import agq, hluq, lnq, power_of_two

FAMILIES = {"hluq": hluq, "lnq": lnq, "power_of_two": power_of_two, "agq": agq}
scales = st.floats(1e-3, 1e3)
no_offset = st.just(0.0)


@dataclass
class Case:
    family: str
    bits: int
    params: object

    @property
    def table(self):
        return FAMILIES[self.family].table(self.params, self.bits)

    def encode(self, x):
        return FAMILIES[self.family].encode(x, self.params, self.bits)

    def decode(self, codes):
        return FAMILIES[self.family].decode(codes, self.params, self.bits)

    def fake_quantize(self, x):
        return FAMILIES[self.family].fake_quantize(x, self.params, self.bits)


def number(value):
    return torch.tensor([value])


@st.composite
def cases(draw, families=tuple(FAMILIES), offsets=no_offset):
    family = draw(st.sampled_from(families))
    bits = draw(st.integers(2, 6 if family == "power_of_two" else 8))
    scale = draw(scales)
    if family == "hluq":
        step = scale * draw(st.floats(0.01, 2))
        levels = draw(st.integers(1, min(16, 2**bits - 2)))
        params = hluq.HLUQParams(number(draw(offsets)), number(scale), number(step), torch.tensor([levels]))
    elif family == "lnq":
        params = lnq.LNQParams(number(draw(st.floats(1e-3, 200))), number(min(scale, 1.0)))
    elif family == "agq":
        params = agq.AGQParams(number(scale), torch.tensor([draw(st.sampled_from(agq.allowed_taus(bits)))]))
    else:
        params = power_of_two.PowerOfTwoParams(number(draw(offsets)), number(scale))
    return Case(family, bits, params)


def values_around(table, count=300, seed=0):
    """Values everywhere: boundaries and levels with their float32 neighbours, below, above, tiny, infinite."""
    edges = torch.cat([table.boundaries, table.levels, table.top])
    span = table.top - table.bottom
    spread = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 1.3 * span + table.bottom
    fine = span * torch.logspace(-12, 0.2, count) + table.bottom
    odd = torch.tensor([0.0, -0.0, -1.0, -1e-30, 1e-45, 1e38, math.inf, -math.inf])
    near = [torch.nextafter(edges, torch.tensor(toward)) for toward in (math.inf, -math.inf)]
    return torch.cat([edges, *near, spread, fine, odd, odd + table.bottom])


def scale_names(case):
    return {"hluq": ("scale_log", "scale_uniform"), "lnq": ()}.get(case.family, ("scale",))


def example(family, bits=4):
    scale = number(0.5)
    params = {
        "hluq": hluq.HLUQParams(number(0.0), scale, number(0.1), torch.tensor([4])),
        "lnq": lnq.LNQParams(number(10.0), scale),
        "power_of_two": power_of_two.PowerOfTwoParams(number(0.0), scale),
        "agq": agq.AGQParams(scale, torch.tensor([4])),
    }[family]
    return Case(family, bits, params)
