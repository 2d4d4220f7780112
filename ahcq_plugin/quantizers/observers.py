# SPDX-License-Identifier: Apache-2.0
"""Observers: statistics of tensors, turned into a quantization range."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization import ObserverBase

from ahcq_plugin.functional.range_search import search_range
from ahcq_plugin.functional.uniform import UniformParams, check_bits, qparams_from_range
from ahcq_plugin.quantizers.base import ResizingStateMixin


class RangeObserver(ResizingStateMixin, ObserverBase):
    """Running mean over calls of a range (lo, hi) per tensor or channel.

    Args:
        quant_min, quant_max: 0 and 2^bits - 1.
        ch_axis: axis that keeps its own range, -1 for one range per tensor.
    """

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(dtype=torch.quint8)
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.bits = check_bits(int(quant_max).bit_length())
        self.register_buffer("min_val", torch.zeros(1))
        self.register_buffer("max_val", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def rows(self, x: Tensor) -> Tensor:
        """x as (channels, values); one row per tensor if ``ch_axis`` is -1."""
        if self.ch_axis == -1:
            return x.reshape(1, -1)
        return x.movedim(self.ch_axis, 0).flatten(1)

    def find_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(lo, hi), each (channels,), of ``rows`` (channels, values)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything seen."""
        self.count.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            self.absorb(self.summary(x.detach()))
        return x

    def summary(self, x: Tensor, ahead: bool = False) -> tuple:
        """What ``absorb`` needs of a call with ``x``, not empty.

        Args:
            ahead: it may be absorbed after others that are not known yet (of other processes).
        """
        return self.find_range(self.rows(x.float()))

    def absorb(self, summary: tuple) -> None:
        """Take a call's ``summary`` in."""
        lo, hi = summary
        seen = int(self.count)
        if seen and self.min_val.shape != lo.shape:
            raise ValueError(
                f"the number of channels changed between calls: {tuple(self.min_val.shape)}, then {tuple(lo.shape)}"
            )
        if not seen:
            self.min_val, self.max_val = lo, hi
        else:
            self.min_val.add_((lo - self.min_val) / (seen + 1))
            self.max_val.add_((hi - self.max_val) / (seen + 1))
        self.count += 1

    def uniform_params(self) -> UniformParams:
        """Uniform parameters of the averaged range.

        Raises:
            RuntimeError: nothing was observed.
        """
        if not int(self.count):
            raise RuntimeError("the observer has seen no data: run `calibrate` with at least one batch that reaches it")
        return qparams_from_range(self.min_val, self.max_val, self.bits)

    def calculate_qparams(self):
        params = self.uniform_params()
        return params.scale, params.zero_point


class AvgMinMaxObserver(RangeObserver):
    """Mean over calls of the minimum and of the maximum."""

    def find_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.amin(1), rows.amax(1)


class RangeSearchObserver(RangeObserver):
    """Mean over calls of the range with the least mean |x_hat - x|^2.4 (100 widths x all zero points)."""

    def find_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return search_range(rows, self.bits)
