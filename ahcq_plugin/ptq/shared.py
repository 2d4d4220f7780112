# SPDX-License-Identifier: Apache-2.0
"""Weights that several quantized layers read: one of them would learn what another has rounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers.layers import held_weight, read_parameters

#: Components of a recipe that change weights, each layer by itself.
_CHANGES = ("acnr", "condiquant", "refit", "rotate", "center", "center_norms", "big", "tune_weight_lr")


def check_shared(units: Mapping[str, nn.Module], recipe: Recipe) -> None:
    """Refuse layers that read the same rows of one parameter, where ``recipe`` changes the weight of each.

    Rounding to nearest puts such a weight on one grid whoever does it; learned rounding, or a change of the weight
    beforehand, would undo in one layer what another was fitted to.

    Raises: ValueError: two layers share a weight; both are named.
    """
    if recipe.granularity == "none" and not any(getattr(recipe, key) for key in _CHANGES):
        return
    readers: dict[int, list[tuple[str, range]]] = defaultdict(list)
    for unit, module in units.items():
        for name, layer in weight_layers(module).items():
            weight = read_parameters(layer)[0]
            rows = range(*held_weight(name, layer)[1].indices(len(weight)))
            readers[id(weight)].append((f"{unit}.{name}", rows))
    for layers in readers.values():
        for number, (one, rows) in enumerate(layers):
            other = next(_overlapping(rows, layers[:number]), None)
            if other is not None:
                raise ValueError(
                    f"the layers {other} and {one} share a weight, which the recipe {recipe.name!r} would change for "
                    "each of them: give each its own (`layer.weight = nn.Parameter(layer.weight.clone())`), use the "
                    "recipe 'rtn', or leave one out with `units=`"
                )


def _overlapping(rows: range, layers: Iterable[tuple[str, range]]) -> Iterator[str]:
    return (name for name, others in layers if max(rows.start, others.start) < min(rows.stop, others.stop))
