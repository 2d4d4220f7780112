# SPDX-License-Identifier: Apache-2.0
"""LNQ fake quantizer: logarithmic non-linear quantization of attention probabilities (AHCQ-SAM)."""

from __future__ import annotations

import torch
from torch import Tensor

from ahcq_plugin.functional import lnq
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.functional.tables import Table
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.search import geometric
from ahcq_plugin.quantizers.table import TableFakeQuantize

PUBLISHED_FACTORS = (0.001, 0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
#: The last three are for attention that is spread over hundreds or thousands of tokens: with probabilities near
#: 1 / 4096 even a = 200 gives an almost uniform grid, most of whose levels lie above all values.
SHAPE_FACTORS = (*PUBLISHED_FACTORS, 500.0, 2000.0, 5000.0)
CLIP_SHARES = geometric(1.0, 0.05, 14)
MIN_CLIP = 1e-8


class LNQFakeQuantize(TableFakeQuantize):
    """LNQ per tensor, static. ``scale`` is the clip; it and the shape factor are searched together.

    ``finish`` rounds the decode table to ``lnq.DECODE_FRACTION_BITS`` fraction bits of the clip into the buffer
    ``levels`` (empty before), which then is what decodes: hardware with that table adds no error.
    """

    family = "lnq"
    functional = lnq
    params_type = lnq.LNQParams

    def __init__(
        self, observer=OutputErrorObserver, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("shape_factor", torch.ones(1))
        self.register_buffer("levels", torch.zeros(0))

    def tensors(self) -> list[Tensor]:
        return [self.shape_factor, self.scale, self.levels]

    def params(self) -> lnq.LNQParams:
        return lnq.LNQParams(self.shape_factor, self.scale)

    @classmethod
    def table_of(cls, tensors: list[Tensor], bits: int) -> Table:
        shape_factor, clip, levels = tensors
        return lnq.table(lnq.LNQParams(shape_factor, clip), bits, _known(levels))

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        return lnq.fake_quantize(x, self.params(), self.bits, _known(self.levels), drop)

    def candidates(self) -> list[lnq.LNQParams]:
        largest = self.activation_post_process.statistics()[2].clamp(min=MIN_CLIP)
        known = largest.cpu()  # else the host would wait for each

        def made(clip: Tensor, shape: float, share: float) -> lnq.LNQParams:
            return lnq.LNQParams(torch.full_like(clip, shape), clip * share)

        # at 8 bits the smallest levels of a steep table would be one in hardware
        pairs = [(shape, share) for shape in SHAPE_FACTORS for share in CLIP_SHARES]
        rising = [p for p in pairs if int(lnq.integer_levels(made(known, *p), self.bits).diff().min()) > 0]
        return [made(largest, *pair) for pair in rising]

    def take(self, params: lnq.LNQParams) -> None:
        self.scale, self.shape_factor = params.clip.clone(), params.shape_factor.clone()
        self.levels = self.levels.new_zeros(0)

    def finish(self) -> None:
        integers = lnq.integer_levels(self.params(), self.bits).float()
        self.levels = integers * self.scale * 2.0**-lnq.DECODE_FRACTION_BITS

    def problems(self) -> list[str]:
        return [] if len(self.levels) else ["its decode table is not rounded"]


def _known(levels: Tensor) -> Tensor | None:
    return levels if len(levels) else None
