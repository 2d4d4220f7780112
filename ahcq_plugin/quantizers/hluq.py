# SPDX-License-Identifier: Apache-2.0
"""HLUQ fake quantizer: powers of two for small values, a uniform part for large ones (AHCQ-SAM)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import hluq
from ahcq_plugin.quantizers.base import MIN_SCALE, LearnedScaleMixin
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.search import geometric
from ahcq_plugin.quantizers.table import TableFakeQuantize

RANGE_SHARES = (0.1, 0.3, 0.5)
LEVEL_DIVISORS = (8, 4, 2)
SEARCHED_RANGES = geometric(1.0, 0.1, 14)
MIN_RANGE = 1e-8


class HLUQFakeQuantize(LearnedScaleMixin, TableFakeQuantize):
    """HLUQ per tensor. ``scale`` is [scale_log, scale_uniform], learned; offset and number of log levels are fixed.

    The offset is the mean minimum. scale_log is a share 0.1, 0.3 or 0.5 of the range, the number of log levels an
    eighth, a quarter or half of the codes (1 to 16): the pair with the least squared output error wins.

    Args:
        search_range: besides the range from mean minimum to mean maximum, try shares of it down to 0.1.
    """

    family = "hluq"
    functional = hluq
    params_type = hluq.HLUQParams
    output_error_power = 2

    def __init__(
        self,
        observer=OutputErrorObserver,
        quant_min=0,
        quant_max=255,
        ch_axis=-1,
        role="",
        search_range=False,
        **observer_kwargs,
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.ranges = SEARCHED_RANGES if search_range else (1.0,)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("log_levels", torch.ones(1, dtype=torch.int32))

    def tensors(self) -> list[Tensor]:
        return [self.offset, self.scale[:1], self.scale[1:], self.log_levels]

    def candidates(self) -> list[hluq.HLUQParams]:
        lo, hi, _ = self.activation_post_process.statistics()
        span = (hi - lo).clamp(min=MIN_RANGE)
        codes = 2**self.bits
        chosen = []
        level_numbers = sorted({min(max(codes // d, 1), hluq.MAX_LOG_LEVELS) for d in LEVEL_DIVISORS})
        for part, share, levels in itertools.product(self.ranges, RANGE_SHARES, level_numbers):
            steps = (codes - 1) * (1 - levels / codes)
            scales = [(span * part * s).clamp(min=MIN_SCALE) for s in (share, (1 - share) / steps)]
            chosen.append(hluq.HLUQParams(lo, *scales, torch.full_like(lo, levels, dtype=torch.int32)))
        return chosen

    def take(self, params: hluq.HLUQParams) -> None:
        self.scale.data = torch.cat([params.scale_log, params.scale_uniform])
        self.offset, self.log_levels = params.offset.clone(), params.log_levels.clone()
