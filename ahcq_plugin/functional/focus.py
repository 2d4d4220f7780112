# SPDX-License-Identifier: Apache-2.0
"""Where attention looks, and how far two attentions look at different places (SAQ-SAM's clipping metric)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Share of a row's largest probability above which a key is in focus.
FOCUS_SHARE = 0.5


def focus_mask(attention: Tensor, share: float = FOCUS_SHARE) -> Tensor:
    """Keys in focus: ``attention > share * (largest of the row)``.

    Args:
        attention: (..., queries, keys) floats, probabilities.
        share: in [0, 1).
    Returns:
        bool, the same shape; a row of probabilities has at least one key in focus.
    """
    return attention > share * attention.amax(-1, keepdim=True)


def focus_distance(reference: Tensor, attention: Tensor, share: float = FOCUS_SHARE) -> Tensor:
    """1 - IoU of the keys in focus, of each product pooled over its queries, mean over products.

    Args:
        reference, attention: (..., queries, keys) floats, probabilities; leading axes are prompts and heads.
    Returns:
        float64 scalar in [0, 1]; 0 where there is no product.
    """
    wanted, found = focus_mask(reference, share), focus_mask(attention, share)
    both = (wanted & found).sum((-2, -1), dtype=torch.float64)
    either = (wanted | found).sum((-2, -1), dtype=torch.float64)
    return (1 - both / either.clamp(min=1)).sum() / max(both.numel(), 1)
