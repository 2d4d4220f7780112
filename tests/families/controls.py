# SPDX-License-Identifier: Apache-2.0
"""What an error of 8 bits is made of: causes taken away one after the other, and noise in place of rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.prepare import prepare_unit
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.quantizers import UniformFakeQuantize
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver
from tests.families.case import Case, Family, pooled_error
from tests.families.choices import Choices

#: What ``controls`` measures, in its order.
CHOICES, ATTENTION, RANGES, NOISE = "choices", "attention", "ranges", "noise"
#: Of noise: errors of a few numbers differ twofold between draws.
DRAWS = 8
_ATTENTION_WEIGHTS = "softmax_post_act_fake_quantizer"


class WholeRangeObserver(AvgMinMaxObserver):
    """The range that holds every value of every call; the recipes take the mean of the calls' ranges."""

    def absorb(self, summary: tuple) -> None:
        lo, hi = summary
        if int(self.count):
            lo, hi = torch.minimum(lo, self.min_val), torch.maximum(hi, self.max_val)
        self.min_val, self.max_val = lo, hi
        self.count += 1


def controls(family: Family) -> dict[str, float]:
    """Relative error of W8A8 by ``rtn`` with one cause after the other taken away.

    Returns:
        ``choices``: the model decides (which mask is best) as in floating point. ``attention``: attention weights are
        in floating point, too: of thousands of tokens most get less than half a step of an even grid, and the sum of
        what is lost is no noise. ``ranges``: they hold all values, too. ``noise``: decisions as in floating point, and
        noise within half a step of every quantizer in place of its rounding, the largest of ``DRAWS`` errors: the least
        that 8 bits do to this model, whose rounding is one draw.
    """
    case = family.case()
    choices = [Choices() for _ in case.items]
    expected = _outputs(case.model, case, choices)

    def error(model: nn.Module) -> float:
        return pooled_error(_outputs(model, case, choices), expected)

    model = _calibrated(case, UniformFakeQuantize, True)
    errors = {CHOICES: error(model)}
    _float_attention_weights(model)
    errors[ATTENTION] = error(model)
    whole = unclipped(family.case())
    _float_attention_weights(whole)
    noise = noisy(family.case())  # each call draws anew
    return errors | {RANGES: error(whole), NOISE: max(error(noise) for _ in range(DRAWS))}


@torch.no_grad()
def _outputs(model: nn.Module, case: Case, choices: Sequence[Choices]) -> list[Any]:
    outputs = []
    for item, choice in zip(case.items, choices, strict=True):
        with choice:
            outputs.append(case.forward(model, item))
    return outputs


def _float_attention_weights(model: nn.Module) -> None:
    for name, quantizer in quantizers(model):
        if name.endswith(_ATTENTION_WEIGHTS):
            quantizer.enable_fake_quant(False)


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
