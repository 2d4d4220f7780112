# SPDX-License-Identifier: Apache-2.0
"""Observers: statistics of tensors, from which quantizers take their parameters.

``AvgMinMaxObserver`` and ``OwnErrorObserver`` give a range at once. The others keep a sample besides, for a choice that
is made when all items were seen: ``OutputErrorObserver`` by the error of the output, ``ChannelObserver`` for CAG.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization import ObserverBase

from ahcq_plugin.functional import grouping
from ahcq_plugin.functional.range_search import search_range
from ahcq_plugin.functional.uniform import UniformParams, check_bits, qparams_from_range
from ahcq_plugin.quantizers.base import ResizingStateMixin
from ahcq_plugin.quantizers.host_value import HostValue
from ahcq_plugin.quantizers.sampling import halvings, strided
from ahcq_plugin.quantizers.scores import Scores


class RangeObserver(ResizingStateMixin, ObserverBase):
    """Running mean over calls of a range (lo, hi) per tensor or channel.

    Args:
        quant_min, quant_max: 0 and 2^bits - 1.
        ch_axis: axis that keeps its own range, -1 for one range per tensor.
    """

    count: Tensor

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(dtype=torch.quint8)
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.bits = check_bits(int(quant_max).bit_length())
        self.register_buffer("min_val", torch.zeros(1))
        self.register_buffer("max_val", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self._calls = HostValue()

    @property
    def calls(self) -> int:
        """How many calls were seen; a look at it does not wait for the device."""
        return int(self._calls.read(self.count))

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
        seen = self.calls
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
        self._calls.note(self.count, seen + 1)

    def check_seen(self) -> None:
        """RuntimeError if nothing was observed."""
        if not self.calls:
            raise RuntimeError("the observer has seen no data: run `calibrate` with at least one batch that reaches it")

    def uniform_params(self) -> UniformParams:
        """Uniform parameters of the averaged range.

        Raises:
            RuntimeError: nothing was observed, or values that are not finite.
        """
        self.check_seen()
        self.check_finite(self.min_val, self.max_val)
        return qparams_from_range(self.min_val, self.max_val, self.bits)

    def check_finite(self, *values: Tensor) -> None:
        """RuntimeError unless all of the observed ``values`` are finite."""
        if not bool(torch.isfinite(torch.cat(values)).all()):
            raise RuntimeError(
                f"the observed range must be finite, got [{float(self.min_val.amin())}, {float(self.max_val.amax())}]: "
                "look for NaN or infinite values in the data, or overflow in the floating-point model"
            )

    def calculate_qparams(self):
        params = self.uniform_params()
        return params.scale, params.zero_point


class AvgMinMaxObserver(RangeObserver):
    """Mean over calls of the minimum and of the maximum."""

    def find_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.amin(1), rows.amax(1)


class OwnErrorObserver(RangeObserver):
    """Mean over calls of the range with the least error of the tensor's own: mean |x_hat - x|^2.4 over 100 widths x all
    zero points."""

    def find_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return search_range(rows, self.bits)


class SamplingObserver(AvgMinMaxObserver):
    """Mean over calls of the minimum and of the maximum, and a sample of all calls.

    The sample takes evenly strided parts of every call, at most ``most_per_call``. When it exceeds ``most``, it is
    halved, and so is what later calls give. It serves calibration only and is not in the state dict.
    """

    most_per_call: int
    most: int

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(quant_min, quant_max, ch_axis)
        self.register_buffer("sample", torch.zeros(0), persistent=False)
        self.per_call = self.most_per_call

    def parts(self, x: Tensor) -> Tensor:
        """x with what is sampled along the first axis."""
        raise NotImplementedError

    def reset(self) -> None:
        super().reset()
        self.sample, self.per_call = self.sample.new_zeros(0), self.most_per_call

    def summary(self, x: Tensor, ahead: bool = False) -> tuple:
        rates = halvings(self.most_per_call) if ahead else (self.per_call,)
        return *super().summary(x), {rate: strided(self.parts(x), rate).float() for rate in rates}

    def absorb(self, summary: tuple) -> None:
        *extremes, samples = summary
        super().absorb(tuple(extremes))
        new = samples[self.per_call]
        self.sample = torch.cat([self.sample.to(new.device), new]) if self.sample.numel() else new.clone()
        if len(self.sample) > self.most:
            self.sample, self.per_call = self.sample[::2].clone(), max(self.per_call // 2, 1)


class OutputErrorObserver(SamplingObserver):
    """What a search by output error starts from: mean minimum and maximum, the largest value, a sample of the values.

    ``scores`` holds the candidates' errors between the two passes of a calibration.
    """

    most_per_call, most = 2**12, 2**16

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(quant_min, quant_max, ch_axis)
        self.register_buffer("largest", torch.zeros(1))
        self.scores: Scores | None = None

    def parts(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def reset(self) -> None:
        super().reset()
        self.largest, self.scores = torch.zeros_like(self.largest), None

    def summary(self, x: Tensor, ahead: bool = False) -> tuple:
        return x.amax().float().view(1), *super().summary(x, ahead)

    def absorb(self, summary: tuple) -> None:
        highest, *others = summary
        self.largest = torch.maximum(self.largest, highest) if self.calls else highest
        super().absorb(tuple(others))

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean minimum, mean maximum and largest value, each (1,) float32.

        Raises:
            RuntimeError: nothing was observed, or values that are not finite.
        """
        self.check_seen()
        values = self.min_val, self.max_val, self.largest
        self.check_finite(*values)
        return values


class ChannelObserver(SamplingObserver):
    """Mean over calls of minimum and maximum of every channel of the last axis, and a sample of rows (tokens).

    ``points`` gives the sample up.
    """

    most_per_call, most = 2**8, 2**11

    def parts(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def rows(self, x: Tensor) -> Tensor:
        return self.parts(x).T

    def points(self) -> Tensor:
        """(C, grouping.POINTS) float32: what ``grouping`` knows of each channel; once per calibration.

        Raises:
            RuntimeError: nothing was observed, or values that are not finite.
        """
        self.check_seen()
        if not self.sample.numel():
            raise RuntimeError("the observer has no sample left of its calibration: run `calibrate` again")
        points = grouping.describe_channels(self.sample, self.min_val, self.max_val)
        self.sample = self.sample.new_zeros(0)
        if not bool(points.isfinite().all()):
            raise RuntimeError("the observed values must be finite: look for NaN or overflow in the model")
        return points
