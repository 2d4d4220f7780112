# SPDX-License-Identifier: Apache-2.0
"""The parts of a promptable model, seen in one run: stages of encoder blocks, and the decoder's transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import UnitError
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.ptq.stream import UnitStream


@dataclass(frozen=True)
class Stages:
    """How units of a model are learned together, and what responds to them.

    Attributes:
        groups: the units in the order of their calls. Blocks in a chain, each of which only gets what the one before
            gave, and keep its shape, are cut behind every block of global attention (``window_size`` 0; blocks without
            windows stand alone); everything else stands alone.
        chain: the blocks that are such a chain's: tokens can skip them.
        decoder: the module around the last unit that the model calls once and that returns prompt and image tokens.
        decoder_units: names of the units in it.
    """

    groups: list[tuple[str, ...]]
    chain: frozenset[str]
    decoder: nn.Module
    decoder_units: frozenset[str]

    def by_response(self, group: tuple[str, ...]) -> bool:
        """Whether the response says what a group learns: of stages of the chain, and of all layers of the decoder but
        the last, which has no image tokens."""
        inside = [unit for unit_group in self.groups for unit in unit_group if unit in self.decoder_units]
        return group[0] in self.chain or (group[0] in self.decoder_units and group[-1] != inside[-1])

    def skipped_behind(self, group: tuple[str, ...]) -> frozenset[str]:
        """The blocks that the tokens of a stage skip."""
        if group[0] not in self.chain:
            return frozenset()
        later = self.groups[self.groups.index(group) + 1 :]
        same = group[0].rpartition(".")[0]
        return frozenset(
            name for names in later for name in names if name in self.chain and name.rpartition(".")[0] == same
        )


def find_stages(stream: UnitStream) -> Stages:
    """Watch the units of ``stream`` and the modules around the last one in a forward on its first item.

    Raises:
        UnitError: a unit is called more than once, or nothing around the last unit returns prompt and image tokens.
    """
    order, model = stream.order, stream.model
    calls: dict[str, tuple[tuple, dict, Any]] = {}

    def handler(name: str, unit_forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if name in calls:
            raise UnitError(f"`par` needs units that are called once in a forward; '{name}' is called again")
        out = unit_forward(*args, **kwargs)
        calls[name] = args, kwargs, out
        return out

    around = _around(order[-1])
    returned: dict[str, list[Any]] = {name: [] for name in around}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: returned[name].append(out))
        for name in around
    ]
    try:
        with torch.no_grad(), intercepted(stream.units, handler):
            stream.run(0)
    finally:
        for handle in handles:
            handle.remove()
    called = [name for name in around if returned[name]]
    if not called or len(returned[called[0]]) != 1 or _floats(returned[called[0]][0]) < 2:
        raise UnitError(
            f"`par` needs a decoder as SAM's: a module around the last unit, '{order[-1]}', that is called once and "
            "returns prompt tokens and image tokens; set the recipe's `par` to False"
        )
    decoder = called[0]
    chain = frozenset(_chain(calls, order))
    inside = frozenset(name for name in order if name.startswith(f"{decoder}."))
    return Stages(_groups(stream.units, order, chain, calls), chain - inside, model.get_submodule(decoder), inside)


def _around(name: str) -> list[str]:
    """Names of the modules around a module, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _floats(outputs: Any) -> int:
    return sum(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(outputs))


def _follows(calls: dict[str, tuple[tuple, dict, Any]], before: str, name: str) -> bool:
    """Whether ``name`` gets what its sibling ``before`` gave, and nothing else."""
    args, kwargs, _ = calls[name]
    is_sibling = before.rpartition(".")[0] == name.rpartition(".")[0]
    return is_sibling and not kwargs and len(args) == 1 and args[0] is calls[before][2] and _keeps_shape(calls[name])


def _keeps_shape(call: tuple[tuple, dict, Any]) -> bool:
    args, _, out = call
    both = (*args[:1], out)
    return len(both) == 2 and all(isinstance(t, Tensor) for t in both) and both[0].shape == both[1].shape


def _chain(calls: dict[str, tuple[tuple, dict, Any]], order: list[str]) -> list[str]:
    """Every unit that follows another, and those that they follow."""
    found: dict[str, None] = {}
    for before, name in zip(order, order[1:], strict=False):
        if _keeps_shape(calls[before]) and _follows(calls, before, name):
            found[before] = found[name] = None
    return list(found)


def _groups(
    units: dict[str, nn.Module], order: list[str], chain: frozenset[str], calls: dict[str, tuple[tuple, dict, Any]]
) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    for name in order:
        before = groups[-1][-1] if groups else ""
        in_window = bool(getattr(units[before], "window_size", None)) if before else False
        if in_window and {before, name} <= chain and _follows(calls, before, name):
            groups[-1] += (name,)
        else:
            groups.append((name,))
    return groups
