# SPDX-License-Identifier: Apache-2.0
"""Uniform fake quantizer of activations with a learnable scale (LSQ) and a fixed integer zero point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.quantizers.base import FakeQuantize, per_channel
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver

MIN_SCALE = torch.finfo(torch.float32).eps


class UniformFakeQuantize(FakeQuantize):
    """Asymmetric uniform quantization, per tensor (``ch_axis=-1``) or per channel; forward is decode(encode(x))."""

    family = "uniform"

    def __init__(self, observer=AvgMinMaxObserver, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
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

    def quantize(self, x: Tensor) -> Tensor:
        grad_factor = (max(x.numel() // self.scale.numel(), 1) * self.quant_max) ** -0.5
        return uniform.fake_quantize(x, self.params(x.ndim), self.bits, grad_factor)

    def commit(self) -> None:
        params = self.activation_post_process.uniform_params()
        self.scale.data = params.scale.clone()
        self.zero_point = params.zero_point.clone()
        self.keep_valid()

    def learnable_scales(self) -> list[nn.Parameter]:
        return [self.scale]

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.scale.abs_().clamp_(min=MIN_SCALE)
