# SPDX-License-Identifier: Apache-2.0
"""Channel-Aware Grouping (CAG): a uniform quantizer per channel, clustered into a few groups of channels (AHCQ-SAM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.grouping import cluster
from ahcq_plugin.quantizers.base import MILESTONES, FakeQuantize
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver
from ahcq_plugin.quantizers.uniform import MIN_SCALE


class LastAxisMinMaxObserver(AvgMinMaxObserver):
    """Mean over calls of the minimum and of the maximum of every channel of the last axis."""

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).T


class CAGFakeQuantize(FakeQuantize):
    """Uniform quantization with parameters per group of channels; channels lie on the last axis.

    Calibration gives every channel its own range. At the milestones of reconstruction the channels are clustered to 8,
    4, 2 and 1 times ``groups`` groups; ``finish`` clusters to ``groups`` at once where none was passed. Zero points are
    not learned.

    The paper clusters the groups of the milestone before, and with them their compromises. Here every milestone
    clusters the channels anew, each with the quantizer that it had when it was alone, its scale changed by as much as
    its groups have learned since.

    Attributes:
        scale: (G,) parameter, learned.
        zero_point: (G,) int32.
        labels: (C,) int64 in [0, G), the group of each channel.
        own_scale: (C,) float32, scale that a channel would have alone, as a multiple of its group's.
        own_zero_point: (C,) int32, the zero point that it would have alone.

    Args:
        groups: groups in the end; 0: one for every channel.
    """

    family = "cag"

    def __init__(
        self,
        observer=LastAxisMinMaxObserver,
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
        self.groups = groups
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("labels", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("own_scale", torch.ones(1))
        self.register_buffer("own_zero_point", torch.zeros(1, dtype=torch.int32))

    def params(self) -> uniform.UniformParams:
        """Parameters of every channel, (C,)."""
        return uniform.UniformParams(self.scale[self.labels], self.zero_point[self.labels])

    def channel_axis(self, ndim: int) -> int | None:
        return ndim - 1

    def encode(self, x: Tensor) -> Tensor:
        return uniform.encode(x, self.params(), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform.decode(codes, self.params(), self.bits)

    def quantize(self, x: Tensor) -> Tensor:
        # LSQ's factor of the gradient, from the number of values that share a scale.
        channels = torch.zeros_like(self.scale).index_add_(0, self.labels, torch.ones_like(self.own_scale))
        values = (channels * (x.numel() // len(self.labels))).clamp(min=1)
        return uniform.fake_quantize(x, self.params(), self.bits, (values * self.quant_max).rsqrt()[self.labels])

    def commit(self) -> None:
        params = self.activation_post_process.uniform_params()
        self.scale.data, self.scale.grad = params.scale.clone(), None
        self.zero_point, self.own_zero_point = params.zero_point.clone(), params.zero_point.clone()
        self.labels = torch.arange(len(params.scale), device=params.scale.device)
        self.own_scale = torch.ones_like(params.scale)
        self.keep_valid()

    def importance(self) -> Tensor:
        """(C,) sum over the layers behind of the squared weights of each input channel; ones without Linear layers."""
        layers = [layer for layer in self.consumers if isinstance(layer, nn.Linear)]
        if not layers:
            return torch.ones_like(self.own_scale)
        return sum(layer.weight.detach().float().square().sum(0) for layer in layers)

    @torch.no_grad()
    def regroup(self, count: int) -> bool:
        """Cluster the channels into ``count`` groups; True if there were more, ``scale`` is then a new parameter."""
        if self.scale.numel() <= count:
            return False
        alone = uniform.UniformParams(self.own_scale * self.scale[self.labels], self.own_zero_point)
        self.labels, params = cluster(alone, self.importance().to(alone.scale.device), count, self.bits)
        self.scale = nn.Parameter(params.scale, requires_grad=self.scale.requires_grad)
        self.zero_point = params.zero_point
        self.keep_valid()
        self.own_scale = alone.scale / self.scale.detach()[self.labels]
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

    def learnable_scales(self) -> list[nn.Parameter]:
        return [self.scale]

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.scale.abs_().clamp_(min=MIN_SCALE)

    def permutation(self) -> Tensor:
        """int64 (C,): order of the channels that makes groups contiguous, stable within a group."""
        return self.labels.argsort(stable=True)

    def boundaries(self) -> Tensor:
        """int64 (G,): where each group begins in the permuted order."""
        sizes = torch.bincount(self.labels, minlength=self.scale.numel())
        return sizes.cumsum(0) - sizes

    def parameter_bits(self) -> int:
        """Bits that its parameters take in hardware: a float32 scale and a zero point for each group."""
        return self.scale.numel() * (32 + self.bits)
