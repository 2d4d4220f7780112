# SPDX-License-Identifier: Apache-2.0
"""Keeps nested tensors per item on a device or on disk, tensors that repeat along the batch only once."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Repeated:
    """A tensor of equal rows: one row, and how often (SAM repeats the image tokens for every box)."""

    row: Tensor
    count: int

    def expand(self) -> Tensor:
        """The full tensor, without copying the rows."""
        return self.row.expand(self.count, *self.row.shape[1:])


def _pack(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.ndim > 1 and value.shape[0] > 1 and bool((value[1:] == value[:1]).all()):
        return Repeated(value[:1].clone(), value.shape[0])
    # A view of a larger tensor would keep all of it alive.
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Repeated):
        return Repeated(value.row.to(device), value.count)
    return value.to(device) if isinstance(value, Tensor) else value


class Store:
    """``store[key] = nested tensors``; ``store.get(key, device)`` gives them back, equal bit for bit.

    Args:
        device: ``cpu``, ``cuda`` or ``disk``.
        root: folder for ``disk`` (a temporary one if None); what the store wrote is removed by ``clear``.
    """

    def __init__(self, device: str, root: str | Path | None = None):
        self._device = device
        self._items: dict[Any, Any] = {}
        self._folder: Path | None = None
        if device == "disk":
            if root is not None:
                Path(root).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="cache-", dir=root))
        self._written = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.discard(key)
        packed = pytree.tree_map(_pack, value)
        if self._folder is None:
            self._items[key] = pytree.tree_map(lambda v: _move(v, self._device), packed)
            return
        path = self._folder / f"{self._written}.pt"
        self._written += 1
        torch.save(packed, path)
        self._items[key] = path

    def __contains__(self, key: Any) -> bool:
        return key in self._items

    def get(self, key: Any, device: torch.device) -> Any:
        """The nested tensors of ``key`` on ``device``; repeated rows are expanded views: do not write to them."""
        item = self._items[key]
        if self._folder is not None:
            # Written by this process a moment ago; holds our own dataclass.
            item = torch.load(item, map_location="cpu", weights_only=False)
        moved = pytree.tree_map(lambda v: _move(v, device), item)
        return pytree.tree_map(lambda v: v.expand() if isinstance(v, Repeated) else v, moved)

    def discard(self, key: Any) -> None:
        """Forget ``key`` if present."""
        item = self._items.pop(key, None)
        if isinstance(item, Path):
            item.unlink(missing_ok=True)

    def clear_items(self) -> None:
        """Forget every item."""
        for key in list(self._items):
            self.discard(key)

    def clear(self) -> None:
        """Forget everything and remove the folder."""
        self.clear_items()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
