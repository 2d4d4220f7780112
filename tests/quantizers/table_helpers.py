# SPDX-License-Identifier: Apache-2.0
"""Calibration of the searched fake quantizers on small tensors, for their tests."""

import pytest
import torch

from ahcq_plugin.quantizers.agq import AGQFakeQuantize
from ahcq_plugin.quantizers.hluq import HLUQFakeQuantize
from ahcq_plugin.quantizers.lnq import LNQFakeQuantize
from ahcq_plugin.quantizers.power_of_two import PowerOfTwoFakeQuantize

FAMILIES = [HLUQFakeQuantize, LNQFakeQuantize, AGQFakeQuantize, PowerOfTwoFakeQuantize]
LEARNED = [HLUQFakeQuantize, AGQFakeQuantize, PowerOfTwoFakeQuantize]
all_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.family)
learned_families = pytest.mark.parametrize("family", LEARNED, ids=lambda f: f.family)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def items_for(family, count=2, rows=12, columns=40):
    """Tensors of the kind that the family is for: GELU outputs or attention probabilities."""
    raw = [randn(2, rows, columns, seed=seed) * (1 + 0.2 * seed) for seed in range(count)]
    if family in (HLUQFakeQuantize, PowerOfTwoFakeQuantize):
        return [torch.nn.functional.gelu(x) for x in raw]
    return [torch.softmax(3 * x, -1) for x in raw]


def observe(quantizer, items):
    quantizer.activation_post_process.reset()
    quantizer.enable_observer()
    for x in items:
        quantizer(x)
    quantizer.enable_observer(False)
    return quantizer


def calibrated(family, items, product=None, bits=4):
    quantizer = observe(family(quant_max=2**bits - 1), items)
    if product is not None:
        assert quantizer.begin_search()
        for x in items:
            quantizer.score(x, product)
    quantizer.commit()
    quantizer.enable_fake_quant()
    return quantizer


def same(a, b):
    return all(torch.equal(getattr(a, name).reshape(-1), getattr(b, name).reshape(-1)) for name in vars(a))
