# SPDX-License-Identifier: Apache-2.0
"""Items of calibration data: moving them, and running a model on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for mappings, ``model(*batch)`` for tuples and lists, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The same nested structure with every tensor on ``device``."""
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter."""
    return next(model.parameters()).device


def check_batches(batches: Any) -> None:
    """Raise unless ``batches`` can be gone through more than once and holds something."""
    if not hasattr(batches, "__len__") or not hasattr(batches, "__getitem__"):
        raise TypeError(
            "`batches` must be a sequence (len() and indexing), since several stages go through it; "
            f"got {type(batches).__name__}: wrap it in list(...)"
        )
    if len(batches) == 0:
        raise ValueError("`batches` is empty: calibration needs at least one item")


def run_first(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """``forward(model, batch)`` of the first item, with errors that say whose fault it is. Infinite values are allowed:
    masks of attention hold them.

    Raises:
        ValueError: the item holds NaN, ``forward`` fails on it, or its result is None or holds NaN.
    """
    if where := _with_nan(batch):
        raise ValueError(f"`batches[0]`{where.rstrip()} holds NaN: look for damaged data, or a division by zero")
    try:
        out = forward(model, batch)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"`batches[0]` does not go through `forward` ({type(error).__name__}: {error}); items are what "
            "`forward(model, item)` takes, without `forward` what the model takes"
        ) from error
    if out is None:
        raise ValueError("`forward` returned None: it must run the model on the item, and return what it gives")
    if where := _with_nan(out):
        raise ValueError(f"the model's output{where.rstrip()} for `batches[0]` holds NaN before anything is quantized")
    return out


def _with_nan(tree: Any) -> str:
    """Where a nested structure first holds NaN, as ``['image']``; of a bare tensor ' '; '' where nowhere."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
            return pytree.keystr(path) or " "
    return ""
