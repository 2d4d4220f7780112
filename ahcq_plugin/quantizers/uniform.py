# SPDX-License-Identifier: Apache-2.0
"""Uniform fake quantizer of activations with a learnable scale (LSQ) and a fixed integer zero point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.quantizers.base import FakeQuantize, LearnedScaleMixin, per_channel
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, OutputErrorObserver
from ahcq_plugin.quantizers.search import OutputErrorSearch, geometric

END_SHARES = geometric(1.0, 0.2, 9)


class UniformFakeQuantize(LearnedScaleMixin, OutputErrorSearch, FakeQuantize):
    """Asymmetric uniform quantization, per tensor (``ch_axis=-1``) or per channel; forward is decode(encode(x)).

    With ``per_head``, of queries, keys and values, there is one scale and zero point for each head of their attention;
    one for the tensor until ``lay_out`` says where its heads are (``calibrate`` does).

    With an ``OutputErrorObserver`` the range is searched by the squared error of the product behind the tensor: shares
    1 to 0.2 of the mean minimum with shares of the mean maximum. With any other observer it is the observer's range.

    Raises:
        ValueError: an ``OutputErrorObserver`` with ``ch_axis`` other than -1, or ``per_head`` with either.
    """

    family = "uniform"
    functional = uniform
    output_error_power = 2

    def __init__(
        self,
        observer=AvgMinMaxObserver,
        quant_min=0,
        quant_max=255,
        ch_axis=-1,
        role="",
        per_head=False,
        **observer_kwargs,
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        if self.searches or per_head:
            self.check_tensor_wide()
        self._heads: HeadAxis | None = HeadAxis()
        if per_head:
            if self.searches:
                raise ValueError("`per_head` takes its ranges from an observer that gives them at once")
            self.activation_post_process.ch_axis = 0  # it sees a row for each head
            self.register_buffer("heads", torch.ones(3, dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def params(self, ndim: int = 1) -> uniform.UniformParams:
        """Parameters shaped to broadcast against an ``ndim``-dimensional tensor, of heads against a split one."""
        return self._shaped(self._params(), ndim)

    def _shaped(self, params: uniform.UniformParams, ndim: int) -> uniform.UniformParams:
        if self.head_axis.count > 1:
            return self.head_axis.shaped(params)
        parts = (per_channel(part, self.ch_axis, ndim) for part in (params.scale, params.zero_point))
        return uniform.UniformParams(*parts)

    def _params(self) -> uniform.UniformParams:
        return uniform.UniformParams(self.scale, self.zero_point)

    @property
    def per_head(self) -> bool:
        """Whether heads may have parameters of their own."""
        return "heads" in self._buffers

    @property
    def head_axis(self) -> HeadAxis:
        """Where the heads are; one head is the whole tensor."""
        if self._heads is None:
            self._heads = HeadAxis(*self.heads.tolist())
        return self._heads

    def lay_out(self, axis: HeadAxis) -> None:
        """Have parameters for the heads of ``axis`` from the next calibration on."""
        self.heads.copy_(torch.tensor([axis.from_end, axis.count, axis.inner]))
        self._heads = axis

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._heads = None if self.per_head else HeadAxis()

    def look(self) -> None:
        super().look()
        self.head_axis  # noqa: B018  read it now: compiled code cannot

    def _apply_grids(self, function: Callable[..., Tensor], x: Tensor, params: uniform.UniformParams, *args: Any):
        """``function(x, params, bits, *args)`` with (channels,) parameters brought into the shape of x."""
        shaped = self._shaped(params, x.ndim)
        if self.head_axis.count > 1:
            return function(self.head_axis.split(x), shaped, self.bits, *args).reshape(x.shape)
        return function(x, shaped, self.bits, *args)

    def grids(self, shape: Sequence[int]) -> uniform.UniformParams:
        """Scale and zero point of every value of a tensor of that shape."""
        place = self.scale.new_zeros(()).expand(shape)
        scale = self._apply_grids(lambda x, params, _: x + params.scale, place, self._params())
        zero_point = self._apply_grids(lambda x, params, _: x + params.zero_point, place, self._params())
        return uniform.UniformParams(scale, zero_point.to(self.zero_point.dtype))

    def observed(self, x: Tensor) -> Tensor:
        return self.head_axis.rows(x) if self.per_head and x.numel() else x

    def encode(self, x: Tensor) -> Tensor:
        return self._apply_grids(uniform.encode, x, self._params())

    def decode(self, codes: Tensor) -> Tensor:
        return self._apply_grids(uniform.decode, codes, self._params())

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        grad_factor = (max(x.numel() // self.scale.numel(), 1) * self.quant_max) ** -0.5
        if drop is not None and self.head_axis.count > 1:
            drop = replace(drop, dice=self.head_axis.split(drop.dice))
        return self._apply_grids(uniform.fake_quantize, x, self._params(), grad_factor, drop)

    def quantize_compiled(self, x: Tensor) -> Tensor:
        return self._apply_grids(uniform.round_trip, x, self._params())

    def quantize_with(self, x: Tensor, params: uniform.UniformParams) -> Tensor:
        """What ``quantize(x)`` would give with other parameters, (channels,) as its observer has ranges."""
        return self._apply_grids(uniform.round_trip, x, params)

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
