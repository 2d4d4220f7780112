# SPDX-License-Identifier: Apache-2.0
"""Outputs of units that do not change while others are tuned, computed once for each item."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.ptq.reading import read_units, units_behind
from ahcq_plugin.ptq.store import Store
from ahcq_plugin.ptq.stream import owned, zeros_like

#: Bytes that the tuned units of an item may keep for backward.
KEPT_FOR_BACKWARD = 512 * 2**20


def chosen_units(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Module]:
    """The prepared units whose names match one of ``globs``; all of them where none does."""
    units = prepared_units(model)
    matching = {name for glob in globs for name in fnmatch.filter(units, glob)} or set(units)
    return {name: unit for name, unit in units.items() if name in matching}


class Replay:
    """Runs a frozen model again and again, unit by unit: what does not depend on the units that are tuned is computed
    once for each item and looked up afterwards; of the others, backward computes a unit anew instead of keeping all of
    its tensors, where an item's would take more than ``KEPT_FOR_BACKWARD``: at SAM-B's size those of one block's
    attention take gigabytes.

    Args:
        tuned: names of units.
        run: ``run(item)`` runs the model on an item and returns its output.
        device: where the model is.
        cache_device, root: where outputs are kept, see ``Store``.
    """

    def __init__(
        self,
        model: nn.Module,
        tuned: set[str],
        run: Callable[[int], Any],
        device: torch.device,
        cache_device: str = "cpu",
        root: Any = None,
    ):
        self._units, self._run, self._device = prepared_units(model), run, device
        self._kept, self._read = _kept(self._units, tuned, run) if tuned < set(self._units) else (set(), set())
        self._store, self._shapes = Store(cache_device, root), {}
        self._item, self._calls = 0, Counter()
        self._growth: dict[str, float] = {}
        self._free = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, calls of the units are answered; afterwards what was kept is freed."""
        try:
            with intercepted(self._units, self._answer):
                yield
        finally:
            self._store.clear()

    def __call__(self, item: int) -> Any:
        """The model's output on an item."""
        self._item, self._calls, self._free = item, Counter(), KEPT_FOR_BACKWARD
        return self._run(item)

    def _answer(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if name not in self._kept:
            if torch.is_grad_enabled() and not self._keeps(name, forward, args, kwargs):
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return forward(*args, **kwargs)
        key = (name, self._item, self._calls[name])
        self._calls[name] += 1
        if key not in self._shapes:
            with torch.no_grad():
                given = forward(*args, **kwargs)
            if name in self._read:
                self._store[key] = owned(given)  # the model may write to what it gets
            self._shapes[key] = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), given)
            return given
        if name in self._read:
            return owned(self._store.get(key, self._device))
        return pytree.tree_map_only(Tensor, lambda t: zeros_like(t, self._device), self._shapes[key])

    def _keeps(self, name: str, forward: Callable[..., Any], args: tuple, kwargs: dict) -> bool:
        """Whether what a unit keeps for backward, by its first call's ratio to its inputs, is still free."""
        inputs = sum(leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if name not in self._growth:
            self._growth[name] = _bytes_for_backward(lambda: forward(*args, **kwargs)) / max(inputs, 1)
        needed = self._growth[name] * inputs
        keeps = needed <= self._free
        self._free -= needed if keeps else 0
        return keeps


def _bytes_for_backward(run: Callable[[], Any]) -> int:
    """What autograd would keep of ``run()``, each time that it is kept; nothing is."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes), lambda _: None):
        run()
    return sum(sizes)


def _kept(units: dict[str, nn.Module], tuned: set[str], run: Callable[[int], Any]) -> tuple[set[str], set[str]]:
    """The units that do not depend on the tuned ones, and those of them whose outputs the others or the model read."""
    out: list[Any] = []
    with torch.no_grad():
        reading = read_units(units, lambda: out.append(run(0)), partial=True)
    kept = {name for name in reading.order if name not in tuned and not reading.behind[name] & tuned}
    read = units_behind(out).union(*(reading.reads[name] for name in reading.order if name not in kept))
    return kept, kept & read
