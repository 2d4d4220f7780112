# SPDX-License-Identifier: Apache-2.0
"""Items of calibration data: moving them, and running a model on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.support.given import check_model
from ahcq_plugin.support.tool import is_foreseen

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
    """Device of the first parameter.

    Raises: TypeError, ValueError: no model, or one without parameters.
    """
    check_model(model)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameters: there is nothing to quantize")
    return parameter.device


def check_batches(batches: Any, name: str = "batches") -> None:
    """Raise unless ``batches``, the argument ``name``, can be gone through more than once and holds something."""
    is_sequence = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
    if not is_sequence or isinstance(batches, (Mapping, str, bytes)):
        raise TypeError(
            f"`{name}` must be a sequence (len() and indexing), since several stages go through it; "
            f"got {type(batches).__name__}: wrap it in list(...)"
        )
    if len(batches) == 0:
        raise ValueError(f"`{name}` is empty: calibration needs at least one item")


def run_first(model: nn.Module, batches: Sequence[Any], forward: Forward) -> Any:
    """``forward(model, batches[0])``, with errors that say whose fault it is. Infinite values are allowed:
    masks of attention hold them.

    Raises:
        ValueError: the item holds NaN, ``forward`` fails on it, or its result is None or holds NaN.
    """
    with naming_item("batches[0]"):
        batch = batches[0]
        check_item(batch, "batches[0]")
        out = forward(model, batch)
    if out is None:
        raise ValueError("`forward` returned None: it must run the model on the item, and return what it gives")
    if where := _with_nan(out):
        raise ValueError(f"the model's output{where.rstrip()} for `batches[0]` holds NaN before anything is quantized")
    return out


def naming_item(item: str) -> AbstractContextManager[None]:
    """``blaming`` the item that goes through ``forward`` within the context."""
    hint = "items are what `forward(model, item)` takes, without `forward` what the model takes"
    return blaming(f"`{item}` does not go through `forward`", hint)


@contextmanager
def blaming(what: str, hint: str = "") -> Iterator[None]:
    """Errors of user code and of torch within the context become a ValueError that begins with ``what``; those that
    this package raised in words of its own, and those of memory, pass as they are."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_foreseen(error) or "can't allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} ({type(error).__name__}: {reason:.300}){'; ' if hint else ''}{hint}") from error


def check_item(batch: Any, item: str) -> None:
    """Raise ValueError for a batch with NaN in it; ``item`` is its name in the message."""
    if where := _with_nan(batch):
        raise ValueError(f"`{item}`{where.rstrip()} holds NaN: look for damaged data, or a division by zero")


def _with_nan(tree: Any) -> str:
    """Where a nested structure first holds NaN, as ``['image']``; of a bare tensor ' '; '' where nowhere."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
            return pytree.keystr(path) or " "
    return ""
