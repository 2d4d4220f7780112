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
    4, 2 and 1 times ``groups`` groups; ``finish`` clusters to ``groups`` at once where none was passed.

    Attributes:
        scale: (G,) parameter, learned. zero_point: (G,) int32. labels: (C,) int64, the group of each channel.

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

    def params(self) -> uniform.UniformParams:
        """Parameters of every channel, (C,)."""
        return uniform.UniformParams(self.scale[self.labels], self.zero_point[self.labels])

    def encode(self, x: Tensor) -> Tensor:
        return uniform.encode(x, self.params(), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return uniform.decode(codes, self.params(), self.bits)

    def quantize(self, x: Tensor) -> Tensor:
        grad_factor = (max(x.numel() // self.scale.numel(), 1) * self.quant_max) ** -0.5
        return uniform.fake_quantize(x, self.params(), self.bits, grad_factor)

    def commit(self) -> None:
        params = self.activation_post_process.uniform_params()
        self.scale.data = params.scale.clone()
        self.zero_point = params.zero_point.clone()
        self.labels = torch.arange(len(params.scale), device=params.scale.device)
        self.keep_valid()

    def importance(self) -> Tensor:
        """(C,) sum over the layers behind of the squared weights of each input channel; ones without Linear layers."""
        layers = [layer for layer in self.consumers if isinstance(layer, nn.Linear)]
        if not layers:
            return torch.ones(len(self.labels), device=self.scale.device)
        return sum(layer.weight.detach().float().square().sum(0) for layer in layers)

    @torch.no_grad()
    def regroup(self, count: int) -> bool:
        """Cluster the groups to ``count``; True if there were more."""
        if self.scale.numel() <= count:
            return False
        weights = torch.zeros_like(self.scale).index_add_(0, self.labels, self.importance().to(self.scale.dtype))
        present = uniform.UniformParams(self.scale.detach(), self.zero_point)
        mapping, params = cluster(present, weights, count, self.bits)
        self.labels = mapping[self.labels]
        self.scale = nn.Parameter(params.scale, requires_grad=self.scale.requires_grad)
        self.zero_point = params.zero_point
        return True

    def milestone(self, done: float) -> bool:
        factor = 2 ** (len(MILESTONES) - 1 - MILESTONES.index(done))
        return self.groups > 0 and self.regroup(factor * self.groups)

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
