# SPDX-License-Identifier: Apache-2.0
"""Keeps nested tensors per item on a device or on disk: rows that repeat once, very large tensors in half precision."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: Elements from which a float32 tensor is kept in half precision: the image tokens that SAM's second two-way layer has
#: for every box (16 x 4096 x 256), not those of one image. Rounding by 2^-11 is far below any quantizer's step.
HALF_FROM = 2**23
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Repeated:
    """A tensor of equal rows: one row, and how often (SAM repeats the image tokens for every box)."""

    row: Tensor
    count: int

    def expand(self) -> Tensor:
        """The full tensor, without copying the rows."""
        return self.row.expand(self.count, *self.row.shape[1:])


@dataclass(frozen=True)
class Halved:
    """A float32 tensor in half precision."""

    half: Tensor

    def expand(self) -> Tensor:
        """The tensor in float32."""
        return self.half.float()


def _pack(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.ndim > 1 and value.shape[0] > 1 and bool((value[1:] == value[:1]).all()):
        return Repeated(value[:1].clone(), value.shape[0])
    if value.dtype == torch.float32 and value.numel() >= HALF_FROM and float(value.abs().max()) < _HALF_MAX:
        return Halved(value.half())
    # A view of a larger tensor would keep all of it alive.
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Repeated):
        return Repeated(value.row.to(device), value.count)
    if isinstance(value, Halved):
        return Halved(value.half.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


class Store:
    """``store[key] = nested tensors``; ``store.get(key, device)`` gives them back, equal bit for bit below
    ``HALF_FROM`` elements, rounded to half precision above.

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

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def get(self, key: Any, device: torch.device) -> Any:
        """The nested tensors of ``key`` on ``device``; repeated rows are expanded views: do not write to them."""
        item = self._items[key]
        if self._folder is not None:
            # Written by this process a moment ago; holds our own dataclass.
            item = torch.load(item, map_location="cpu", weights_only=False)
        moved = pytree.tree_map(lambda v: _move(v, device), item)
        return pytree.tree_map(lambda v: v.expand() if isinstance(v, (Repeated, Halved)) else v, moved)

    def nbytes(self) -> int:
        """Bytes of all tensors kept in memory (0 for ``disk``); shared storage counts each time."""
        kept = {Repeated: lambda v: v.row, Halved: lambda v: v.half}
        leaves = (kept.get(type(leaf), lambda v: v)(leaf) for leaf in pytree.tree_leaves(list(self._items.values())))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

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
