# SPDX-License-Identifier: Apache-2.0
"""Feeds each unit with the inputs it sees in the floating-point and in the quantized model, without re-running units.

The model's own Python runs between the units, whatever it is. To collect the inputs of unit k, the model is run with
every earlier unit replaced by a look-up of its stored output, and stopped at unit k: so no unit is computed more than
once per item and model, and only the cheap glue (patch embedding, prompt encoder, reshapes) is repeated. Outputs that
no later unit reads are dropped; in their place the glue gets zeros of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.batches import Forward, model_device, to_device
from ahcq_plugin.ptq.calibrate import intercepted
from ahcq_plugin.ptq.prepare import original_weights, set_quantization
from ahcq_plugin.ptq.store import Store

STREAMS = ("quantized", "floating")


class _Stop(Exception):
    """Ends a model's forward once the wanted unit's inputs are known."""


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
            leaf._ahcq_sources = getattr(leaf, "_ahcq_sources", frozenset()) | sources


def units_behind(tree: Any) -> frozenset[str]:
    """Units whose outputs the tensors in ``tree`` were computed from."""
    found: frozenset[str] = frozenset()
    for leaf in pytree.tree_leaves(tree):
        found |= getattr(leaf, "_ahcq_sources", frozenset())
    return found


class UnitStream:
    """Goes through a prepared and calibrated model unit by unit.

    For each ``name`` in ``order``: ``collect(name)``, read ``inputs``/``target``, change the unit, ``advance(name)``.

    Attributes:
        order: unit names in order of execution.
    Raises:
        RuntimeError: a unit is never called, or called more than once in a forward.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward,
        cache_device: str = "cpu",
        cache_root: Any = None,
    ):
        self.model, self.batches, self.forward = model, batches, forward
        self.device = model_device(model)
        self.units = prepared_units(model)
        self.new_store = partial(Store, cache_device, cache_root)
        self._inputs, self._outputs = self.new_store(), self.new_store()
        self._shapes: dict[tuple[str, int], Any] = {}
        self.order, self._reads = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[list[str], dict[str, frozenset[str]]]:
        """Order of the units and which units' outputs each one reads, from one floating-point run on the first item."""
        order: list[str] = []
        reads: dict[str, frozenset[str]] = {}

        def handler(name, unit_forward, args, kwargs):
            if name in reads:
                raise RuntimeError(
                    f"unit {name!r} is called more than once in one forward; reconstruction needs one call per item: "
                    "pass a `forward` that calls it once"
                )
            order.append(name)
            reads[name] = units_behind((args, kwargs))
            out = unit_forward(*args, **kwargs)
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    leaf._ahcq_sources = frozenset((name,))
            return out

        set_quantization(self.model, False)
        with _Provenance(), intercepted(self.units, handler):
            self.forward(self.model, to_device(self.batches[0], self.device))
        missing = [name for name in self.units if name not in reads]
        if missing:
            raise RuntimeError(f"the forward never calls unit {missing[0]!r}; leave it out with `units=`")
        return order, reads

    @torch.no_grad()
    def collect(self, name: str) -> None:
        """Store the inputs of unit ``name`` for every item, in both models, and its floating-point outputs.

        Outputs of earlier units that no later unit reads go at once: with the inputs they would be kept twice.
        """
        position = self.order.index(name)
        unread = set(self.order[:position]) - self._read_from(position + 1)
        for stream in STREAMS:
            for item, batch in enumerate(self.batches):
                self._inputs[stream, item] = self._run_to(name, position, stream, item, batch)
                for other in unread:
                    self._outputs.discard((other, stream, item))
        set_quantization(self.units[name], False)
        with original_weights(self.units[name]):
            for item in range(len(self.batches)):
                args, kwargs = self.inputs("floating", item)
                self._store_output(name, "floating", item, self.units[name](*args, **kwargs))

    def _run_to(self, name: str, position: int, stream: str, item: int, batch: Any) -> Any:
        caught: list[Any] = []
        earlier = set(self.order[:position])

        def handler(unit_name, unit_forward, args, kwargs):
            if unit_name == name:
                caught.append((args, kwargs))
                raise _Stop
            if unit_name not in earlier:
                raise RuntimeError(f"the order of the units differs between items: {unit_name!r} ran before {name!r}")
            return self._look_up(unit_name, stream, item)

        with intercepted(self.units, handler):
            try:
                self.forward(self.model, to_device(batch, self.device))
            except _Stop:
                return caught[0]
        raise RuntimeError(f"item {item}: the forward never calls unit {name!r}")

    def _look_up(self, name: str, stream: str, item: int) -> Any:
        if (name, stream, item) in self._outputs:
            return self._outputs.get((name, stream, item), self.device)
        zero = {}
        return pytree.tree_map(
            lambda like: zero.setdefault(like.dtype, torch.zeros(1, dtype=like.dtype, device=self.device)).expand(
                like.shape
            ),
            self._shapes[name, item],
        )

    def _store_output(self, name: str, stream: str, item: int, out: Any) -> None:
        self._outputs[name, stream, item] = out
        self._shapes[name, item] = pytree.tree_map(lambda t: torch.empty_like(t, device="meta"), out)

    def inputs(self, stream: str, item: int) -> tuple[tuple, dict]:
        """(args, kwargs) of the collected unit for one item, on the model's device."""
        return self._inputs.get((stream, item), self.device)

    def target(self, name: str, item: int) -> Any:
        """Floating-point output of unit ``name``."""
        return self._outputs.get((name, "floating", item), self.device)

    def _read_from(self, position: int) -> frozenset[str]:
        """Units whose outputs are read by units at ``position`` or later."""
        return frozenset().union(*(self._reads[other] for other in self.order[position:]))

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Compute the quantized outputs of the finished unit ``name``; drop its inputs and what no later unit reads."""
        unit = self.units[name]
        set_quantization(unit, True)
        still_read = name in self._read_from(self.order.index(name) + 1)
        for item in range(len(self.batches)):
            if still_read:
                args, kwargs = self.inputs("quantized", item)
                self._store_output(name, "quantized", item, unit(*args, **kwargs))
            else:
                self._outputs.discard((name, "floating", item))
            for stream in STREAMS:
                self._inputs.discard((stream, item))

    def nbytes(self) -> int:
        """Bytes that the caches hold in memory now."""
        return self._inputs.nbytes() + self._outputs.nbytes()

    def close(self) -> None:
        """Free the caches."""
        self._inputs.clear()
        self._outputs.clear()
