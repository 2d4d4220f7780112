# SPDX-License-Identifier: Apache-2.0
"""Feeds each unit with the inputs it sees in the floating-point and in the quantized model, without re-running units.

The model's own Python runs between the units, whatever it is. To collect the inputs of unit k, the model is run with
every earlier unit replaced by a look-up of its stored output, and stopped at unit k: so no unit is computed more than
once per item and model, and only the cheap glue (patch embedding, prompt encoder, reshapes) is repeated. Outputs that
no later unit reads are dropped; in their place the glue gets zeros of the same shape.

A forward may call a unit several times (SAM 2: once per frame and object); every call is a sample of its own. Units in
a loop (SAM 2's memory) have inputs that depend on units not yet quantized: these run in floating point meanwhile, the
finished units of the loop run again, quantized, and units that do not matter for unit k give zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import UnitError, prepared_units
from ahcq_plugin.ptq.prepared import StopForward, intercepted, original_weights, set_quantization
from ahcq_plugin.ptq.reading import read_units
from ahcq_plugin.ptq.store import Store
from ahcq_plugin.support.batches import Forward, model_device, to_device

STREAMS = ("quantized", "floating")
Key = tuple[str, str, int, int]
"""(unit, stream, item, number of the call in the item's forward)."""


class UnitStream:
    """Goes through a prepared and calibrated model unit by unit.

    For each ``name`` in ``order``: ``collect(name)``, read ``inputs``/``target``, change the unit, ``advance(name)``.

    Attributes:
        order: unit names in order of their last calls.
        samples: (item, call) of every call of the collected unit.
    Raises:
        UnitError: a unit is never called.
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
        self._shapes: dict[tuple[str, int, int], Any] = {}
        self.samples: list[tuple[int, int]] = []
        set_quantization(model, False)
        with torch.no_grad():
            self._reading = read_units(self.units, partial(self.run, 0))
            self.order = self._reading.order
            # (item, unit) -> calls; in a model without repetition one each, which costs no run to find out
            self._calls = self._count_calls() if self._reading.repeats else None

    def run(self, item: int) -> None:
        """One forward of the model as it is now."""
        self.forward(self.model, to_device(self.batches[item], self.device))

    def _count_calls(self) -> Counter[tuple[int, str]]:
        """Run every item once, in floating point, and note the shapes of all outputs."""
        calls: Counter[tuple[int, str]] = Counter()

        def handler(name: str, unit_forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            out = unit_forward(*args, **kwargs)
            self._note_shape(name, item, calls[item, name], out)
            calls[item, name] += 1
            return out

        for item in range(len(self.batches)):
            with intercepted(self.units, handler):
                self.run(item)
        return calls

    @torch.no_grad()
    def collect(self, name: str) -> None:
        """Store the inputs of unit ``name`` for every call, in both models, and its floating-point outputs.

        Outputs of earlier units that no later unit reads go at once: with the inputs they would be kept twice.
        """
        position = self.order.index(name)
        unread = set(self.order[:position]) - self._reading.needed(position + 1)
        set_quantization(self.units[name], False)
        for stream in STREAMS:
            self.samples = []
            for item in range(len(self.batches)):
                self._collect_item(name, position, stream, item)
                for key in [k for k in self._outputs if k[0] in unread and k[1:3] == (stream, item)]:
                    self._outputs.discard(key)
        with original_weights(self.units[name]):
            for sample, (item, call) in enumerate(self.samples):
                args, kwargs = self.inputs("floating", sample)
                self._store_output((name, "floating", item, call), self.units[name](*args, **kwargs))

    def _collect_item(self, name: str, position: int, stream: str, item: int) -> None:
        calls: Counter[str] = Counter()
        earlier = set(self.order[:position])
        last = self._calls[item, name] if self._calls else 1

        def handler(unit_name: str, unit_forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            call = calls[unit_name]
            calls[unit_name] += 1
            if unit_name == name:
                self._inputs[stream, item, call] = owned((args, kwargs)) if self._calls else (args, kwargs)
                self.samples.append((item, call))
                if calls[name] == last:
                    raise StopForward
            return self._stand_in(
                (unit_name, stream, item, call), name, earlier, partial(unit_forward, *args, **kwargs)
            )

        with intercepted(self.units, handler):
            try:
                self.run(item)
            except StopForward:
                return
        raise UnitError(f"item {item}: the forward calls unit {name!r} {calls[name]} times, expected {last}")

    def _stand_in(self, key: Key, wanted: str, earlier: set[str], run: Callable[[], Any]) -> Any:
        """The output of a unit on the way to the unit ``wanted``: looked up where it is final, else computed."""
        name, stream, item, call = key
        if not self._calls and name not in earlier:
            raise UnitError(f"the order of the units differs between items: {name!r} ran before {wanted!r}")
        if name not in self._reading.behind[wanted]:
            return self._look_up(key)
        if name in earlier:
            return self._look_up(key) if stream == "floating" or name in self._reading.settled else run()
        with original_weights(self.units[name]):
            return run()

    def _look_up(self, key: Key) -> Any:
        if key in self._outputs:
            out = self._outputs.get(key, self.device)
        else:
            shapes = self._shapes[key[0], key[2], key[3]]
            out = pytree.tree_map_only(Tensor, lambda like: zeros_like(like, self.device), shapes)
        return owned(out) if self._calls else out

    def _store_output(self, key: Key, out: Any) -> None:
        self._outputs[key] = out
        self._note_shape(key[0], key[2], key[3], out)

    def _note_shape(self, name: str, item: int, call: int, out: Any) -> None:
        self._shapes[name, item, call] = pytree.tree_map(
            lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t, out
        )

    def inputs(self, stream: str, sample: int) -> tuple[tuple, dict]:
        """(args, kwargs) of the collected unit for one sample, on the model's device."""
        return self._inputs.get((stream, *self.samples[sample]), self.device)

    def target(self, name: str, sample: int) -> Any:
        """Floating-point output of the collected unit ``name``."""
        return self._outputs.get((name, "floating", *self.samples[sample]), self.device)

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Compute the quantized outputs of the finished unit ``name``; drop its inputs and what no later unit reads."""
        unit = self.units[name]
        set_quantization(unit, True)
        still_read = name in self._reading.needed(self.order.index(name) + 1)
        for sample, (item, call) in enumerate(self.samples):
            if not still_read:
                self._outputs.discard((name, "floating", item, call))
            elif name in self._reading.settled:
                args, kwargs = self.inputs("quantized", sample)
                self._store_output((name, "quantized", item, call), unit(*args, **kwargs))
            for stream in STREAMS:
                self._inputs.discard((stream, item, call))

    def stand_in(self, name: str, stream: str, item: int) -> Any:
        """What the finished unit ``name`` gave where a later unit reads it, else zeros of its shape; of units that are
        called once."""
        return self._look_up((name, stream, item, 0))

    def nbytes(self) -> int:
        """Bytes that the caches hold in memory now."""
        return self._inputs.nbytes() + self._outputs.nbytes()

    def close(self) -> None:
        """Free the caches."""
        self._inputs.clear()
        self._outputs.clear()


def zeros_like(like: Tensor, device: torch.device) -> Tensor:
    """Zeros of shape and dtype of ``like``, one number in memory: not to be written to."""
    return torch.zeros(1, dtype=like.dtype, device=device).expand(like.shape)


def owned(tree: Any) -> Any:
    """Copies of all tensors: the model may write to what it has, and it may run in inference mode."""
    with torch.inference_mode(False):
        return pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, tree)
