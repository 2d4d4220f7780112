# SPDX-License-Identifier: Apache-2.0
"""Which unit's inputs are computed from which units' outputs, seen in one run of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import UnitError
from ahcq_plugin.ptq.prepared import intercepted

#: Attribute of a tensor: the units whose outputs it was computed from.
_SOURCES = "_ahcq_sources"


@dataclass(frozen=True)
class Reading:
    """The units of a model in the order of their last calls, and what flows between them.

    Attributes:
        order: unit names.
        reads: unit -> units whose outputs its inputs were computed from, with no other unit in between.
        calls: unit -> number of calls.
    """

    order: list[str]
    reads: dict[str, frozenset[str]]
    calls: dict[str, int]

    @property
    def repeats(self) -> bool:
        """Whether any unit is called more than once."""
        return max(self.calls.values()) > 1

    @cached_property
    def behind(self) -> dict[str, frozenset[str]]:
        """unit -> all units that its inputs depend on; in a loop (the memory of SAM 2) that includes itself."""
        behind = dict(self.reads)
        while True:
            wider = {name: sources.union(*(behind[s] for s in sources)) for name, sources in behind.items()}
            if wider == behind:
                return behind
            behind = wider

    @cached_property
    def settled(self) -> frozenset[str]:
        """Units that depend on earlier units only: once these are quantized, their own inputs never change again."""
        return frozenset(n for i, n in enumerate(self.order) if self.behind[n] <= set(self.order[:i]))

    def needed(self, position: int) -> frozenset[str]:
        """Units whose outputs are read when the inputs of units at ``position`` or later are collected."""
        later = self.order[position:]
        run = {name for name in self.order if name not in self.settled and any(name in self.behind[u] for u in later)}
        return frozenset().union(*(self.reads[name] for name in {*later, *run}))


def read_units(units: dict[str, nn.Module], run: Callable[[], Any], partial: bool = False) -> Reading:
    """Watch ``units`` during ``run()``, one forward of their model.

    Args:
        partial: ``run`` may end early; units that it does not call are not part of the result.
    Raises:
        UnitError: a unit is never called.
    """
    order: dict[str, None] = {}
    reads: dict[str, frozenset[str]] = {}
    calls: dict[str, int] = {}

    def handler(name: str, unit_forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        order.pop(name, None)
        order[name] = None
        calls[name] = calls.get(name, 0) + 1
        reads[name] = reads.get(name, frozenset()) | units_behind((args, kwargs))
        out = unit_forward(*args, **kwargs)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                setattr(leaf, _SOURCES, frozenset((name,)))
        return out

    with _Provenance(), intercepted(units, handler):
        run()
    missing = [name for name in units if name not in reads]
    if missing and not partial:
        raise UnitError(f"the forward never calls unit {missing[0]!r}; leave it out with `units=`")
    return Reading(list(order), reads, calls)


class _Provenance(TorchFunctionMode):
    """Marks every tensor with the units whose outputs it was computed from."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources = units_behind((args, kwargs))
        if sources:
            written = args[0] if func is Tensor.__setitem__ else out
            mark(written, sources)
        return out


def mark(tree: Any, sources: frozenset[str]) -> None:
    """Add ``sources`` to the units behind every tensor in ``tree``."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            setattr(leaf, _SOURCES, getattr(leaf, _SOURCES, frozenset()) | sources)


def units_behind(tree: Any) -> frozenset[str]:
    """Units whose outputs the tensors in ``tree`` were computed from."""
    sources: frozenset[str] = frozenset()
    for leaf in pytree.tree_leaves(tree):
        sources |= getattr(leaf, _SOURCES, frozenset())
    return sources
