# SPDX-License-Identifier: Apache-2.0
"""Random masks for QDrop (Wei et al. 2022): which elements are quantized in a step of reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor


def random_mask(like: Tensor, share: float) -> Tensor:
    """1 with probability ``share``, else 0: a tensor of the shape, dtype and device of ``like``.

    One random byte decides an element, so ``share`` is rounded to multiples of 1/256; 0 and 1 are exact. On CPUs this
    is several times faster than ``bernoulli_``, whose time would exceed that of the quantizers.

    Raises:
        ValueError: ``share`` lies outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` must be in [0, 1], got {share!r}")
    threshold = round(share * 256)
    if threshold == 256:
        return torch.ones_like(like)
    mask = torch.empty_like(like)
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    random_bytes = words.view(torch.uint8).as_strided(mask.shape, mask.stride())
    return torch.lt(random_bytes, threshold, out=mask)
