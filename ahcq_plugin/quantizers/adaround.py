# SPDX-License-Identifier: Apache-2.0
"""Weight fake quantizer: uniform per output channel, rounding to nearest or learned (AdaRound)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import adaround, uniform
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.quantizers.base import FakeQuantize, per_channel
from ahcq_plugin.quantizers.host_value import HostValue
from ahcq_plugin.quantizers.observers import OwnErrorObserver


class AdaRoundFakeQuantize(FakeQuantize):
    """Asymmetric uniform quantization of a weight (out, ...) per output channel.

    Before ``init`` it rounds to nearest. ``init(weight)`` starts learning: forward is then the soft weight, a function
    of ``alpha``. ``get_hard_value`` decides every rounding; after ``weight.copy_(hard); adaround = False`` the weight
    is on the grid and rounding to nearest reproduces it.
    """

    family = "adaround"
    calibration_state = (*FakeQuantize.calibration_state, "soft")
    alpha: nn.Parameter | None  # while the rounding is learned

    def __init__(
        self, observer=OwnErrorObserver, quant_min=0, quant_max=255, ch_axis=0, role="weight", **observer_kwargs
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("soft", torch.zeros(1, dtype=torch.uint8))
        self._modes["soft"] = HostValue()
        self.register_parameter("alpha", None)
        self._base: Tensor | None = None
        self.adaround = False

    @property
    def adaround(self) -> bool:
        """Whether forward returns the soft weight."""
        return bool(self._modes["soft"].read(self.soft))

    @adaround.setter
    def adaround(self, value: bool) -> None:
        self._modes["soft"].note(self.soft.fill_(int(value)), bool(value))
        if not value:
            self.alpha, self._base = None, None

    def params(self, ndim: int = 1) -> uniform.UniformParams:
        """Parameters shaped to broadcast against an ``ndim``-dimensional weight."""
        return uniform.UniformParams(
            per_channel(self.scale, self.ch_axis, ndim), per_channel(self.zero_point, self.ch_axis, ndim)
        )

    def init(self, weight: Tensor) -> None:
        """Start learning the rounding of ``weight``; the soft weight equals it up to clipping."""
        params = self.params(weight.ndim)
        self._base = adaround.floor_base(weight.detach(), params)
        self.alpha = nn.Parameter(adaround.init_alpha(weight.detach(), params))
        self.adaround = True

    def rectified_sigmoid(self) -> Tensor:
        """h(alpha) in [0, 1], the weight's shape."""
        return adaround.rectified_sigmoid(self.alpha)

    def get_hard_value(self, weight: Tensor) -> Tensor:
        """``weight`` with every rounding decided: up where h(alpha) >= 0.5; nearest if nothing was learned."""
        params = self.params(weight.ndim)
        if not self.adaround:
            return uniform.decode(uniform.encode(weight, params, self.bits), params, self.bits).to(weight.dtype)
        codes = adaround.hard_codes(weight, self.alpha, params, self.bits)
        return uniform.decode(codes, params, self.bits).to(weight.dtype)

    def encode(self, x: Tensor) -> Tensor:
        return uniform.encode(x, self.params(x.ndim), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform.decode(codes, self.params(codes.ndim), self.bits)

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        params = self.params(x.ndim)
        if not self.adaround:
            return uniform.fake_quantize(x, params, self.bits, drop=drop)
        soft = adaround.soft_weight(self._base, self.alpha, params, self.bits).to(x.dtype)
        return soft if drop is None else drop.apply(x, soft)

    def quantize_compiled(self, x: Tensor) -> Tensor:
        return uniform.round_trip(x, self.params(x.ndim), self.bits)

    def commit(self) -> None:
        params = self.activation_post_process.uniform_params()
        self.scale, self.zero_point = params.scale.clone(), params.zero_point.clone()
