# SPDX-License-Identifier: Apache-2.0
"""Channel-Aware Grouping (CAG): a uniform quantizer per channel, clustered into a few groups of channels (AHCQ-SAM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import grouping, uniform
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.quantizers.base import MILESTONES, FakeQuantize, LearnedScaleMixin
from ahcq_plugin.quantizers.observers import ChannelObserver


class CAGFakeQuantize(LearnedScaleMixin, FakeQuantize):
    """Uniform quantization with parameters per group of channels; channels lie on the last axis.

    Calibration gives every channel the range of least error. At the milestones of reconstruction the channels are
    clustered to 8, 4, 2 and 1 times ``groups`` groups; ``finish`` clusters to ``groups`` at once where none was passed.
    Zero points are not learned.

    The paper clusters the groups of the milestone before, and with them their compromises. Here every milestone
    clusters the channels anew; what was learned enters as a stretch of a channel's values: by as much as the scale that
    it had has changed.

    Attributes:
        scale: (G,) parameter, learned.
        zero_point: (G,) int32.
        labels: (C,) int64 in [0, G), the group of each channel.
        points: (C, grouping.POINTS) float32, values of each channel as calibrated.
        per_scale: (C,) float32, stretch of a channel's values per unit of its group's scale.

    Args:
        groups: groups in the end; 0: one for every channel.

    Raises:
        TypeError: an observer that is not a ``ChannelObserver``.
    """

    family = "cag"
    calibration_state = (*FakeQuantize.calibration_state, "points", "per_scale")

    def __init__(
        self,
        observer=ChannelObserver,
        quant_min=0,
        quant_max=255,
        ch_axis=-1,
        role="",
        groups=4,
        **observer_kwargs,
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 0:
            raise ValueError(f"`groups` must be an integer >= 0 (0: one for every channel), got {groups!r}")
        if not isinstance(self.activation_post_process, ChannelObserver):
            name = type(self.activation_post_process).__name__
            raise TypeError(f"the family {self.family} needs a ChannelObserver, got {name}")
        self.groups = groups
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("labels", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("points", torch.zeros(1, grouping.POINTS))
        self.register_buffer("per_scale", torch.ones(1))

    def params(self) -> uniform.UniformParams:
        """Parameters of every channel, (C,)."""
        return uniform.UniformParams(self.scale[self.labels], self.zero_point[self.labels])

    def channel_axis(self, ndim: int) -> int | None:
        return ndim - 1

    def encode(self, x: Tensor) -> Tensor:
        return uniform.encode(x, self.params(), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform.decode(codes, self.params(), self.bits)

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        # LSQ's factor of the gradient, from the number of values that share a scale.
        channels = torch.zeros_like(self.scale).index_add_(0, self.labels, self.scale.new_ones(self.labels.shape))
        values = (channels * (x.numel() // len(self.labels))).clamp(min=1)
        grad_factor = (values * self.quant_max).rsqrt()[self.labels]
        return uniform.fake_quantize(x, self.params(), self.bits, grad_factor, drop)

    def quantize_compiled(self, x: Tensor) -> Tensor:
        return uniform.round_trip(x, self.params(), self.bits)

    @torch.no_grad()
    def commit(self) -> None:
        self.points = self.activation_post_process.points()
        params = grouping.fit(self.points, self.bits)
        self.scale.data, self.scale.grad = params.scale, None
        self.zero_point = params.zero_point
        self.labels = torch.arange(len(params.scale), device=params.scale.device)
        self.keep_valid()
        self.per_scale = 1 / self.scale.detach()

    def importance(self) -> Tensor:
        """(C,) sum over the layers behind of the squared weights of each input channel; ones without Linear layers."""
        layers = [layer for layer in self.consumers if isinstance(layer, nn.Linear)]
        if not layers:
            return torch.ones_like(self.per_scale)
        first, *others = (layer.weight.detach().float().square().sum(0) for layer in layers)
        return sum(others, first)

    @torch.no_grad()
    def regroup(self, count: int) -> bool:
        """Cluster the channels into ``count`` groups; True if there were more, ``scale`` is then a new parameter."""
        if self.scale.numel() <= count:
            return False
        stretch = self.per_scale * self.scale[self.labels]
        points = self.points * stretch[:, None]
        self.labels, params = grouping.cluster(points, self.importance().to(points.device), count, self.bits)
        self.scale = nn.Parameter(params.scale, requires_grad=self.scale.requires_grad)
        self.zero_point = params.zero_point
        self.keep_valid()
        self.per_scale = stretch / self.scale.detach()[self.labels]
        return True

    def milestone(self, done: float) -> bool:
        passed = sum(done >= share for share in MILESTONES)
        if not self.groups or not passed:
            return False
        return self.regroup(self.groups * 2 ** (len(MILESTONES) - passed))

    def finish(self) -> None:
        if self.groups:
            self.regroup(self.groups)

    def problems(self) -> list[str]:
        if self.groups and self.scale.numel() > self.groups:
            return [f"it has {self.scale.numel()} groups of channels, allowed are {self.groups}"]
        return []

    def permutation(self) -> Tensor:
        """int64 (C,): order of the channels that makes groups contiguous, stable within a group."""
        return self.labels.argsort(stable=True)

    def boundaries(self) -> Tensor:
        """int64 (G,): where each group begins in the permuted order."""
        sizes = torch.bincount(self.labels, minlength=self.scale.numel())
        return sizes.cumsum(0) - sizes
