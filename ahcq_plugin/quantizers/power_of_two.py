# SPDX-License-Identifier: Apache-2.0
"""Power-of-two fake quantizer, for comparison with HLUQ: powers of two over the whole range."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import power_of_two
from ahcq_plugin.quantizers.base import MIN_SCALE, LearnedScaleMixin
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.search import geometric
from ahcq_plugin.quantizers.table import TableFakeQuantize

SCALE_SHARES = geometric(1.0, 0.1, 14)


class PowerOfTwoFakeQuantize(LearnedScaleMixin, TableFakeQuantize):
    """Powers of two per tensor, 2 to 6 bits. ``scale``, the largest level, is searched and then learned.

    The offset is the mean minimum.
    """

    family = "power_of_two"
    functional = power_of_two
    params_type = power_of_two.PowerOfTwoParams

    def __init__(self, observer=OutputErrorObserver, quant_min=0, quant_max=63, ch_axis=-1, role="", **observer_kwargs):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.zeros(1))

    def check_bits(self) -> None:
        power_of_two.check_bits(self.bits)

    def tensors(self) -> list[Tensor]:
        return [self.offset, self.scale]

    def candidates(self) -> list[power_of_two.PowerOfTwoParams]:
        lo, hi, _ = self.activation_post_process.statistics()
        return [power_of_two.PowerOfTwoParams(lo, ((hi - lo) * share).clamp(min=MIN_SCALE)) for share in SCALE_SHARES]

    def take(self, params: power_of_two.PowerOfTwoParams) -> None:
        self.scale.data, self.offset = params.scale.clone(), params.offset.clone()
