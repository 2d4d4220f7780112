# SPDX-License-Identifier: Apache-2.0
"""Bimodal keys (PTQ4SAM's BIG): recognise them and turn their negative channels over.

Keys of SAM's mask decoder have channels around -a and channels around +a; one range for both wastes half its codes on
the gap. Q K^T does not change when the same channels of queries and keys change their sign, so the projections of both
can take the signs in, and one mode is left.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SAMPLE = 8192


@torch.no_grad()
def is_bimodal(values: Tensor, points: int = 128, height: float = 0.01, distance: int = 32) -> bool:
    """Whether the values of all channels together have exactly two modes.

    A Gaussian kernel density (bandwidth by Scott's rule) on ``points`` equally spaced points from the minimum to the
    maximum; modes are its peaks of at least ``height`` times the sum over the points, ``distance`` points apart.

    Args:
        values: (tokens..., channels) floats, the keys of one prompt.
    Returns:
        False also where there is no density: fewer than two values, or all the same.
    Raises:
        ValueError: values that are not finite.
    """
    x = _checked(values).flatten()
    if not x.numel() or x.min() == x.max():
        return False
    from scipy.signal import find_peaks  # here: it takes longer to import than all of ours, and few recipes need it

    peaks, _ = find_peaks(y := density(x, points), height=height * y.sum(), distance=distance)
    return len(peaks) == 2


def density(x: Tensor, points: int) -> np.ndarray:
    """Gaussian kernel density (points,) of float64 values (n,), not all the same, from their minimum to their maximum.

    Of more than 8192 values only so many are used, evenly spaced in ascending order, with the bandwidth that belongs to
    all. (Every k-th value as it comes would do for tokens, but k easily divides the number of channels: then whole
    channels, hence modes, are missed.) Values are taken relative to their range: the density is too.
    """
    x, _ = ((x - x.min()) / (x.max() - x.min())).sort()
    bandwidth = float(x.std()) * len(x) ** -0.2
    if len(x) > _SAMPLE:
        x = x[((torch.arange(_SAMPLE, device=x.device) + 0.5) * (len(x) / _SAMPLE)).long()]
    grid = np.linspace(0, 1, points)
    kernel = np.exp(-0.5 * ((grid[:, None] - x.cpu().numpy()) / bandwidth) ** 2)
    return kernel.mean(1) / (bandwidth * np.sqrt(2 * np.pi))


@torch.no_grad()
def key_signs(values: Tensor) -> Tensor:
    """Sign of the mean of every channel: -1 below 0, else +1 (PTQ4SAM's public code has 0 for 0, which ends a channel).

    Args:
        values: (..., channels) floats, the keys of all prompts and tokens.
    Returns:
        (channels,) of +1 and -1, float32, on the device of ``values``.
    Raises:
        ValueError: values that are not finite.
    """
    x = _checked(values)
    return 1.0 - 2.0 * (x.reshape(-1, x.shape[-1]).sum(0) < 0).float()


@torch.no_grad()
def fold(
    q_weight: Tensor, q_bias: Tensor | None, k_weight: Tensor, k_bias: Tensor | None, signs: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The projections of queries and keys with the output channels of sign -1 turned over; Q K^T keeps every bit.

    Only where nothing between the projections and Q K^T depends on a channel's sign: no rotary embedding, no relative
    position bias made from q.

    Args:
        q_weight, k_weight: (channels, in), each with an ``in`` of its own.
        q_bias, k_bias: (channels,), None for a layer without.
        signs: (channels,) of +1 and -1.
    Returns:
        New tensors (None for None) in the order of the arguments, dtypes as given.
    Raises:
        ValueError: numbers of channels that differ, or signs other than +1 and -1.
    """
    if signs.ndim != 1 or not bool((signs.abs() == 1).all()):
        raise ValueError(f"`signs` must hold a +1 or -1 per channel, got shape {tuple(signs.shape)}, {signs}")

    def turned(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.shape[:1] != signs.shape:
            raise ValueError(f"`{name}` must have {len(signs)} channels as `signs`, got shape {tuple(tensor.shape)}")
        return tensor.detach() * signs.to(tensor).view((-1, 1) if "weight" in name else (-1,))

    return (
        turned("q_weight", q_weight),
        turned("q_bias", q_bias),
        turned("k_weight", k_weight),
        turned("k_bias", k_bias),
    )


def _checked(values: Tensor) -> Tensor:
    """``values`` in float64, if they are finite."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"`values` must be finite, got {int((~values.isfinite()).sum())} values that are not")
    return values.detach().double()
