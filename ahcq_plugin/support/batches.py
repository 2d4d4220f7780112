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
