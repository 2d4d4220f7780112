# SPDX-License-Identifier: Apache-2.0
"""Uniform fake quantizer of activations with a learnable scale (LSQ) and a fixed integer zero point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.quantizers.base import FakeQuantize, LearnedScaleMixin, per_channel
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, OutputErrorObserver
from ahcq_plugin.quantizers.search import OutputErrorSearch, geometric

END_SHARES = geometric(1.0, 0.2, 9)


class UniformFakeQuantize(LearnedScaleMixin, OutputErrorSearch, FakeQuantize):
    """Asymmetric uniform quantization, per tensor (``ch_axis=-1``) or per channel; forward is decode(encode(x)).

    With an ``OutputErrorObserver`` the range is searched by the squared error of the product behind the tensor: shares
    1 to 0.2 of the mean minimum with shares of the mean maximum. With any other observer it is the observer's range.

    Raises:
        ValueError: an ``OutputErrorObserver`` with ``ch_axis`` other than -1.
    """

    family = "uniform"
    functional = uniform
    output_error_power = 2

    def __init__(self, observer=AvgMinMaxObserver, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        if self.searches:
            self.check_tensor_wide()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def params(self, ndim: int = 1) -> uniform.UniformParams:
        """Parameters shaped to broadcast against an ``ndim``-dimensional tensor."""
        return uniform.UniformParams(
            per_channel(self.scale, self.ch_axis, ndim), per_channel(self.zero_point, self.ch_axis, ndim)
        )

    def encode(self, x: Tensor) -> Tensor:
        return uniform.encode(x, self.params(x.ndim), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform.decode(codes, self.params(codes.ndim), self.bits)

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        grad_factor = (max(x.numel() // self.scale.numel(), 1) * self.quant_max) ** -0.5
        return uniform.fake_quantize(x, self.params(x.ndim), self.bits, grad_factor, drop)

    def quantize_compiled(self, x: Tensor) -> Tensor:
        return uniform.round_trip(x, self.params(x.ndim), self.bits)

    @property
    def searches(self) -> bool:
        """Whether the range is searched by output error."""
        return isinstance(self.activation_post_process, OutputErrorObserver)

    def begin_search(self) -> bool:
        return self.searches and super().begin_search()

    def candidates(self) -> list[uniform.UniformParams]:
        lo, hi, _ = self.activation_post_process.statistics()
        lows, highs = (END_SHARES if end else (1.0,) for end in (float(lo) < 0, float(hi) > 0))
        return [uniform.qparams_from_range(lo * low, hi * high, self.bits) for low in lows for high in highs]

    def take(self, params: uniform.UniformParams) -> None:
        self.scale.data, self.zero_point = params.scale.clone(), params.zero_point.clone()

    def commit(self) -> None:
        if self.searches:
            super().commit()
        else:
            self.take(self.activation_post_process.uniform_params())
            self.keep_valid()
