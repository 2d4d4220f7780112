# SPDX-License-Identifier: Apache-2.0
"""Features: what some units of a model, those of an image encoder for example, give to the rest of it.

The masks' error reaches an encoder only through the whole model, which has to run for every step. Its features tell it
more, for every place of the image, and the model runs no further than they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import StopForward, watched
from ahcq_plugin.ptq.reading import read_units, units_behind
from ahcq_plugin.ptq.replay import chosen_units
from ahcq_plugin.support.batches import Forward


class FeatureForward:
    """A forward that runs a model as far as features need it and returns them.

    Args:
        model: prepared.
        globs: of the units.
        forward: of the model.
        batch: an item on the model's device; it shows which of the units the rest of the model, or who gets its output,
            reads.
    Raises:
        ValueError: none of them is read.
    """

    def __init__(self, model: nn.Module, globs: Sequence[str], forward: Forward, batch: Any):
        units, chosen = prepared_units(model), set(chosen_units(model, globs))
        out: list[Any] = []
        with torch.no_grad():
            reading = read_units(units, lambda: out.append(forward(model, batch)))
        behind = units_behind(out).union(*(reading.reads[name] for name in units if name not in chosen))
        self._names = [name for name in reading.order if name in chosen & behind]
        if not self._names:
            raise ValueError(f"recipe: nothing reads what the units of `tune_feature_units`, {list(globs)}, give")
        self._once = all(reading.calls[name] == 1 for name in self._names)
        self._forward = forward

    def __call__(self, model: nn.Module, batch: Any) -> list[Any]:
        """What the units give, in the order of their calls."""
        units, found = prepared_units(model), []

        def note(name: str, unit: nn.Module, given: Any, out: Any) -> None:
            found.append(out)
            if self._once and len(found) == len(self._names):
                raise StopForward

        with watched({name: units[name] for name in self._names}, note), suppress(StopForward):
            self._forward(model, batch)
        return found
