# SPDX-License-Identifier: Apache-2.0
"""AGQ fake quantizer: powers of 2^(1/tau) for attention probabilities (PTQ4SAM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import agq
from ahcq_plugin.quantizers.base import MIN_SCALE, LearnedScaleMixin
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.search import geometric
from ahcq_plugin.quantizers.table import TableFakeQuantize

CLIP_SHARES = geometric(1.0, 0.05, 14)


class AGQFakeQuantize(LearnedScaleMixin, TableFakeQuantize):
    """AGQ per tensor. ``scale``, the largest level, is searched together with tau and then learned."""

    family = "agq"
    functional = agq
    params_type = agq.AGQParams

    def __init__(
        self, observer=OutputErrorObserver, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("tau", torch.full((1,), agq.TAUS[-1], dtype=torch.int32))

    def tensors(self) -> list[Tensor]:
        return [self.scale, self.tau]

    def candidates(self) -> list[agq.AGQParams]:
        largest = self.activation_post_process.statistics()[2]
        return [
            agq.AGQParams((largest * share).clamp(min=MIN_SCALE), torch.full_like(largest, tau, dtype=torch.int32))
            for tau in agq.allowed_taus(self.bits)
            for share in CLIP_SHARES
        ]

    def take(self, params: agq.AGQParams) -> None:
        self.scale.data, self.tau = params.scale.clone(), params.tau.clone()
