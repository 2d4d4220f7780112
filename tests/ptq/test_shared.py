# SPDX-License-Identifier: Apache-2.0
"""Layers that share a weight: rounded once, or refused by name."""

import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from tests.robustness.calls import Block, items, model


class Twice(Block):
    """Its two layers share a square weight."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight


def tied() -> nn.Module:
    given = model()
    given[1].up.weight = given[0].up.weight
    return given


def reused() -> nn.Module:
    given = model()
    given[1].up = given[0].up
    return given


@pytest.mark.parametrize("recipe", ["adaround", "brecq", "ahcq", {"name": "rtn", "acnr": True}])
@pytest.mark.parametrize("build", [tied, reused])
def test_what_two_units_would_change_is_refused(build, recipe):
    given = build()
    with pytest.raises(ValueError, match=r"the layers 0\.up and 1\.up share a weight, which the recipe"):
        quantize(given, items(), recipe, 4, 4, units=Block, iterations=2, progress=False)


def test_within_a_unit_too():
    with pytest.raises(ValueError, match=r"the layers 0\.up and 0\.down share a weight"):
        quantize(nn.Sequential(Twice()), items(), "brecq", units=Block, iterations=2, progress=False)


def test_rounding_to_nearest_rounds_it_once():
    given, apart = tied(), tied()
    apart[1].up.weight = nn.Parameter(apart[0].up.weight.detach().clone())
    results = [quantize(m, items(), "rtn", 4, 4, units=Block, progress=False)[0] for m in (given, apart)]
    assert results[0][1].up.weight is results[0][0].up.weight
    with torch.no_grad():
        assert torch.equal(*(m(items()[0]) for m in results))


def test_a_block_that_is_used_twice_learns_once():
    block = model()[0]
    quantized, report = quantize(nn.Sequential(block, block), items(), "qdrop", iterations=2, progress=False)
    assert len(report.units) == 1 and quantized[0] is quantized[1]
