# SPDX-License-Identifier: Apache-2.0
"""What figure 1 of the AHCQ-SAM paper is drawn from and tabulated of: values of tensors, ranges of their channels,
condition numbers of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahcq_plugin.prequant.spectrum import condition_number


def sample(x: Tensor, count: int) -> Tensor:
    """Values of a tensor at even distances, (n,) in its dtype: all of them, or at least ``count``."""
    flat = x.detach().flatten()
    return flat[:: max(1, len(flat) // count)].clone()


def channel_ranges(x: Tensor) -> Tensor:
    """Smallest and largest value of every channel of the last axis, (2, channels) in the tensor's dtype."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return torch.stack([rows.amin(0), rows.amax(0)])


def condition_numbers(model: nn.Module) -> dict[str, float]:
    """Largest over smallest singular value of each Linear weight, in float64."""
    return {
        name: condition_number(torch.linalg.svdvals(module.weight.detach().double()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
