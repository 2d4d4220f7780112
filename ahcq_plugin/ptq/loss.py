# SPDX-License-Identifier: Apache-2.0
"""What reconstruction and tuning minimise: errors of outputs, and the schedule of the rounding regulariser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree


def output_error(out: Any, target: Any, axes: Sequence[int]) -> Tensor:
    """Squared error: summed over channels, averaged over the rest, added up over the float tensors of ``out``.

    Args:
        axes: where the channels lie, for each leaf of ``out`` (see ``channel_axes``).
    """
    triples = zip(pytree.tree_leaves(out), pytree.tree_leaves(target), axes, strict=True)
    terms = [(o.float() - t.float()).square().sum(axis).mean() for o, t, axis in triples if _is_float(t)]
    return torch.stack(terms).sum()


def relative_error(out: Any, target: Any) -> float:
    """||out - target||^2 / ||target||^2 over the tensors of the structure; those equal bit for bit are left out, since
    constants (positions) would only dilute it."""
    pairs = [
        (o.double(), t.double())
        for o, t in zip(pytree.tree_leaves(out), pytree.tree_leaves(target), strict=True)
        if _is_float(t) and not torch.equal(o, t)
    ]
    error = sum(float((o - t).square().sum()) for o, t in pairs)
    return error / max(sum(float(t.square().sum()) for _, t in pairs), 1e-30)


def model_error(out: Any, target: Any) -> Tensor:
    """What tuning minimises unless told otherwise, a scalar.

    Where a model returns masks as a SAM does, logits (N, M, h, w) and their predicted qualities (N, M): ``mask_error``
    and the mean squared error of the qualities. Else ``out``'s squared error by the target's square, added up over its
    float tensors.
    """
    if _are_masks(target):
        (logits, quality), (wanted, wanted_quality) = out, target
        return mask_error(logits, wanted) + _mean((quality.float() - wanted_quality).square())
    pairs = zip(pytree.tree_leaves(out), pytree.tree_leaves(target), strict=True)
    shares = [(o.float() - t).square().sum() / t.square().sum().clamp(min=1e-30) for o, t in pairs if _is_float(t)]
    return torch.stack(shares).sum()


def mask_error(logits: Tensor, wanted: Tensor) -> Tensor:
    """Distance of masks from soft ones, a scalar: mean cross-entropy of the pixels and mean Dice error of the masks.

    Dice with squares below the line, 1 - 2 Σpt / (Σp² + Σt²) (Milletari et al. 2016, V-Net), is least where the masks
    are equal; with sums below the line it would reward masks that are sharper than the soft ones.

    Args:
        logits, wanted: (..., h, w) floats; the sigmoid of ``wanted`` is the soft mask.
    Returns:
        0 for no masks. The cross-entropy of a soft mask with itself is not 0.
    """
    soft, found = wanted.float().sigmoid(), logits.float().sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits.float(), soft, reduction="none")
    both, squares = (found * soft).sum((-2, -1)), (found.square() + soft.square()).sum((-2, -1))
    dice = 1 - (2 * both + 1) / (squares + 1)  # 1: two empty masks agree
    return _mean(cross) + _mean(dice)


def _mean(x: Tensor) -> Tensor:
    """0 where there is nothing."""
    return x.sum() / max(x.numel(), 1)


def _are_masks(target: Any) -> bool:
    if not isinstance(target, tuple | list) or len(target) != 2 or not all(map(_is_float, target)):
        return False
    masks, quality = target
    return masks.ndim == 4 and masks.shape[:2] == quality.shape


def _is_float(leaf: Any) -> bool:
    """A tensor of floats: units may return sizes, flags and None beside them."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def rounding_exponent(step: int, iterations: int, warmup: float, start: float, end: float) -> float | None:
    """Exponent of the rounding regulariser at ``step`` (from 0): None in the warm-up, then linear."""
    first = int(warmup * iterations)
    if step < first:
        return None
    return start + (end - start) * (step - first) / max(iterations - 1 - first, 1)
