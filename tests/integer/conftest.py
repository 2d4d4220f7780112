# SPDX-License-Identifier: Apache-2.0
"""Small models, quantized without reconstruction, and their integer form."""

from __future__ import annotations

from functools import cache

import pytest
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.integer import to_integer
from ahcq_plugin.zoo.sam import box_forward
from ahcq_plugin.zoo.track import clip_forward
from tests.conftest import make_clips, make_sam2, make_tiny_items, make_tiny_sam

#: Every family between them: CAG, HLUQ, LNQ; uniform; AGQ, powers of two.
RECIPES = {
    "ahcq": {"name": "ahcq"},
    "rtn": {"name": "rtn"},
    "ptq4sam": {"name": "ptq4sam", "families": {"post_act": "power_of_two"}},
}


@cache
def quantized_sam(recipe: str, bits: int) -> nn.Module:
    """The 64-pixel SAM with random weights; weights of 4 bits, activations of ``bits``; calibrated alone."""
    settings = {**RECIPES[recipe], "granularity": "none"}
    items = make_tiny_items()[:1]
    return quantize(make_tiny_sam(), items, settings, 4, bits, forward=box_forward, progress=False)[0]


@cache
def quantized_sam2() -> nn.Module:
    """The 64-pixel SAM 2 with 4 bits."""
    settings = {"name": "rtn", "granularity": "none"}
    return quantize(make_sam2(), make_clips(1), settings, 4, 4, forward=clip_forward, progress=False)[0]


@pytest.fixture(scope="session")
def qmodel() -> nn.Module:
    """The small SAM by ahcq at 4 bits."""
    return quantized_sam("ahcq", 4)


@pytest.fixture(scope="session")
def integer(qmodel) -> nn.Module:
    return to_integer(qmodel)
