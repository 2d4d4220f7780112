# SPDX-License-Identifier: Apache-2.0
"""Evenly strided parts of a tensor, where all of it would be too much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCORED_ELEMENTS = 2**16


def halvings(rate: int) -> list[int]:
    """rate, rate // 2, ... 1: how many values a call may be asked for."""
    return [rate >> k for k in range(rate.bit_length())]


def strided(values: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``values`` along the first axis, evenly strided."""
    return values[:: coprime_step(len(values), -(-len(values) // most))]


def coprime_step(length: int, least: int) -> int:
    """The first number from ``least`` on without common divisor with ``length``: a stride that no period hides from."""
    step = max(least, 1)
    while math.gcd(step, length) > 1:
        step += 1
    return step


def spread_rows(x: Tensor, most: int = SCORED_ELEMENTS) -> Tensor:
    """Evenly spread rows ``x[..., rows, :]`` of at most ``most`` elements in all, but at least one row."""
    if x.ndim < 2 or x.numel() <= most:
        return x
    length = x.shape[-2]
    count = max(1, most // (x.numel() // length))
    if count >= length:
        return x
    rows = (torch.arange(count, device=x.device) * coprime_step(length, length // count) + length // 2) % length
    return x.index_select(-2, rows.sort().values)
