# SPDX-License-Identifier: Apache-2.0
"""Keeps nested tensors per item on a device or on disk: rows that repeat once, very large tensors in half precision,
and where two of these differ by a row that repeats, one of them and the row."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.safe_load import safe_load

#: Elements from which a float32 tensor is kept in half precision: the image tokens that SAM's second two-way layer has
#: for every box (16 x 4096 x 256), not those of one image. Rounding by 2^-11 is far below any quantizer's step.
HALF_FROM = 2**23
_HALF_MAX = torch.finfo(torch.float16).max
#: Largest deviation of a difference's rows, as a share of the largest value: what float32 additions leave.
_ROUNDING = 2**-20


@dataclass(frozen=True)
class Repeated:
    """A tensor of equal rows: one row, and how often (SAM repeats the image tokens for every box)."""

    tensor: Tensor
    count: int


@dataclass(frozen=True)
class Halved:
    """A float32 tensor in half precision."""

    tensor: Tensor


@dataclass(frozen=True)
class Shifted:
    """A halved tensor plus equal rows: one row, and the place of the halved one among the leaves of the tree.

    SAM's final attention reads every box's image tokens twice: as values, and with the positions added as keys.
    """

    tensor: Tensor
    place: int


Packed = (Repeated, Halved, Shifted)


def _pack_tree(tree: Any) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    packed: list[Any] = []
    for leaf in leaves:
        packed.append(_shifted(leaf, leaves, packed) or _pack(leaf) if isinstance(leaf, Tensor) else leaf)
    return pytree.tree_unflatten(packed, spec)


def _pack(value: Tensor) -> Tensor | Repeated | Halved:
    value = value.detach()
    if value.ndim > 1 and value.shape[0] > 1 and bool((value[1:] == value[:1]).all()):
        return Repeated(value[:1].clone(), value.shape[0])
    if value.dtype == torch.float32 and value.numel() >= HALF_FROM and float(value.abs().max()) < _HALF_MAX:
        return Halved(value.half())
    # A view of a larger tensor would keep all of it alive.
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _shifted(value: Tensor, leaves: list[Any], packed: list[Any]) -> Shifted | None:
    """``value`` as an earlier halved leaf plus equal rows, if it is that."""
    for place, kept in enumerate(packed):
        other = leaves[place]
        if isinstance(kept, Halved) and other.shape == value.shape and len(value) > 1 and value.dtype == other.dtype:
            row = (value[:1] - other[:1]).detach()
            largest = max(float(value.abs().max()), float(other.abs().max()))
            apart = (float((v - o - row[0]).abs().max()) for v, o in zip(value, other, strict=True))
            if all(distance <= _ROUNDING * largest for distance in apart):
                return Shifted(row, place)
    return None


def _unpack_tree(tree: Any) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([_unpack(leaf, leaves) for leaf in leaves], spec)


def _unpack(leaf: Any, leaves: list[Any]) -> Any:
    if isinstance(leaf, Repeated):
        return leaf.tensor.expand(leaf.count, *leaf.tensor.shape[1:])
    if isinstance(leaf, Halved):
        return leaf.tensor.float()
    return leaves[leaf.place].tensor + leaf.tensor if isinstance(leaf, Shifted) else leaf


def _move(leaf: Any, device: torch.device | str) -> Any:
    if isinstance(leaf, Packed):
        return replace(leaf, tensor=leaf.tensor.to(device))
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _plain(leaf: Any) -> Any:
    """A leaf as tensors and plain values, for a file that no class is needed to read."""
    if not isinstance(leaf, Packed):
        return leaf
    return {"packed": type(leaf).__name__, **{field.name: getattr(leaf, field.name) for field in fields(leaf)}}


def _from_plain(leaf: Any) -> Any:
    if not isinstance(leaf, dict):
        return leaf
    kinds = {kind.__name__: kind for kind in Packed}
    return kinds[leaf["packed"]](**{key: value for key, value in leaf.items() if key != "packed"})


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
        packed = _pack_tree(value)
        if self._folder is None:
            self._items[key] = pytree.tree_map(lambda v: _move(v, self._device), packed)
            return
        path = self._folder / f"{self._written}.pt"
        self._written += 1
        leaves, spec = pytree.tree_flatten(packed)
        save_checked([_plain(leaf) for leaf in leaves], path)
        self._items[key] = path, spec

    def __contains__(self, key: Any) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def get(self, key: Any, device: torch.device) -> Any:
        """The nested tensors of ``key`` on ``device``; repeated rows are expanded views: do not write to them."""
        item = self._items[key]
        if self._folder is not None:
            path, spec = item
            item = pytree.tree_unflatten([_from_plain(leaf) for leaf in safe_load(path)], spec)
        return _unpack_tree(pytree.tree_map(lambda v: _move(v, device), item))

    def nbytes(self) -> int:
        """Bytes of all tensors kept in memory (0 for ``disk``); shared storage counts each time."""
        leaves = pytree.tree_leaves(list(self._items.values()) if self._folder is None else [])
        leaves = (leaf.tensor if isinstance(leaf, Packed) else leaf for leaf in leaves)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def discard(self, key: Any) -> None:
        """Forget ``key`` if present."""
        item = self._items.pop(key, None)
        if item is not None and self._folder is not None:
            item[0].unlink(missing_ok=True)

    def clear_items(self) -> None:
        """Forget every item."""
        for key in list(self._items):
            self.discard(key)

    def clear(self) -> None:
        """Forget everything and remove the folder."""
        self.clear_items()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
