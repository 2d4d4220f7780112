# SPDX-License-Identifier: Apache-2.0
"""What an error of 8 bits is made of: the same model with noise in place of rounding, and without clipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.prepare import prepare_unit
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.quantizers import UniformFakeQuantize
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver
from tests.families.case import Case


class WholeRangeObserver(AvgMinMaxObserver):
    """The range that holds every value of every call; the recipes take the mean of the calls' ranges."""

    def absorb(self, summary: tuple) -> None:
        lo, hi = summary
        if int(self.count):
            lo, hi = torch.minimum(lo, self.min_val), torch.maximum(hi, self.max_val)
        self.min_val, self.max_val = lo, hi
        self.count += 1


def unclipped(case: Case) -> nn.Module:
    """W8A8 by ``rtn`` with ranges that hold all values."""
    return _calibrated(case, partial(UniformFakeQuantize, observer=WholeRangeObserver), True)


def noisy(case: Case) -> nn.Module:
    """What 8 bits do at best: every value is somewhere within half a step of where it was."""
    model, random = _calibrated(case, UniformFakeQuantize, False), torch.Generator().manual_seed(0)

    def jitter(quantizer: nn.Module, _: object, out: Tensor) -> Tensor:
        return out + quantizer.params(out.ndim).scale * (torch.rand(out.shape, generator=random) - 0.5)

    for _, quantizer in quantizers(model):
        quantizer.register_forward_hook(jitter)
    return model


def _calibrated(case: Case, uniform: Callable[..., UniformFakeQuantize], quantizing: bool) -> nn.Module:
    prepare(
        case.model,
        Recipe.from_config("rtn", w_bits=8, a_bits=8),
        prepare_unit=partial(prepare_unit, families={"uniform": uniform}),
        leave=case.leave,
        run=lambda model: case.forward(model, case.items[0]),
    )
    calibrate(case.model, case.items, case.forward, False)
    for _, quantizer in quantizers(case.model):
        quantizer.finish()
        quantizer.enable_fake_quant(quantizing)
    return case.model
