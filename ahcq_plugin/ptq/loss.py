# SPDX-License-Identifier: Apache-2.0
"""What reconstruction minimises: a unit's output error, and the schedule of the rounding regulariser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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


def _is_float(leaf: Any) -> bool:
    """A tensor of floats: units may return sizes, flags and None beside them."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def rounding_exponent(step: int, iterations: int, warmup: float, start: float, end: float) -> float | None:
    """Exponent of the rounding regulariser at ``step`` (from 0): None in the warm-up, then linear."""
    first = int(warmup * iterations)
    if step < first:
        return None
    return start + (end - start) * (step - first) / max(iterations - 1 - first, 1)
