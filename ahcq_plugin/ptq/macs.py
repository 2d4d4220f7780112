# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates that really run, counted below every wrapper, by the place in the model where they run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.ptq.unit_runner import UnitRunner
from ahcq_plugin.support.batches import Forward, model_device, to_device

Place = tuple[str, ...]
"""(module name,) outside of units, (unit, node) inside of one."""


def _matrix_product(a: Sequence[int], b: Sequence[int]) -> int:
    """(..., m, k) times (..., k, n)."""
    return math.prod(a) * b[-1]


def _convolution(args: tuple, out: Tensor) -> int:
    weight, transposed = args[1].shape, bool(args[6]) if len(args) > 6 else False
    # each output takes C_in / groups * kernel products; transposed: each input gives C_out / groups * kernel of them
    return math.prod(args[0].shape if transposed else out.shape) * math.prod(weight[1:])


def _attention(args: tuple, out: Any) -> int:
    query, key, value = (t.shape for t in args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_COUNTS: dict[str, Callable[[tuple, Any], int]] = {
    "mm": lambda args, out: _matrix_product(args[0].shape, args[1].shape),
    "bmm": lambda args, out: _matrix_product(args[0].shape, args[1].shape),
    "addmm": lambda args, out: _matrix_product(args[1].shape, args[2].shape),
    "baddbmm": lambda args, out: _matrix_product(args[1].shape, args[2].shape),
    "addbmm": lambda args, out: _matrix_product(args[1].shape, args[2].shape),
    "mv": lambda args, out: args[0].numel(),
    "addmv": lambda args, out: args[1].numel(),
    "dot": lambda args, out: args[0].numel(),
    "vdot": lambda args, out: args[0].numel(),
    "convolution": _convolution,
    "_convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_attention_math": _attention,
}
#: Operators that multiply matrices inside and say nothing of how many: the count is then unknown.
_HIDDEN = frozenset(
    [
        "mkldnn_rnn_layer",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_gru_cell",
        "_cudnn_rnn",
        "miopen_rnn",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "bilinear",
        "_trilinear",
        "cdist",
        "_cdist_forward",
        "addr",
        "outer",
        "ger",
        "mkldnn_convolution",
        "mkldnn_linear",
        "_sparse_mm",
        "_addmm_activation",
        "_scaled_mm",
        "_int_mm",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_fused_sdp_choice_math",
    ]
)


class MacCounter(TorchDispatchMode):
    """Counts multiply-accumulates of the operators that run within the context.

    Attributes:
        counts: place -> multiply-accumulates.
        hidden: place -> names of operators whose count is not known.
        place: where the model is at present.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Place, int] = defaultdict(int)
        self.hidden: dict[Place, set[str]] = defaultdict(set)
        self.place: Place = ("",)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name not in _COUNTS:  # in inference mode linear, conv2d, matmul and their kin arrive as one operator
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if name in _COUNTS:
            self.counts[self.place] += _COUNTS[name](args, out)
        elif name in _HIDDEN:
            self.hidden[self.place].add(name)
        return out

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Within the context, what runs is counted for ``place``."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before


class _CountedUnit(UnitRunner):
    """Counts each node for itself."""

    def __init__(self, name: str, unit: fx.GraphModule, counter: MacCounter):
        super().__init__(unit)
        self.name, self.counter = name, counter

    def run_node(self, n: fx.Node) -> Any:
        with self.counter.at((self.name, n.name)):
            return super().run_node(n)


@torch.no_grad()
def count_macs(model: nn.Module, batch: Any, forward: Forward) -> MacCounter:
    """Multiply-accumulates of one item, by unit and node, and by module outside of units.

    Every unit runs node by node; fused attention outside of units is counted as the two products that it is.
    """
    units = prepared_units(model)
    counter = MacCounter()
    runners = {name: _CountedUnit(name, unit, counter) for name, unit in units.items()}
    outside = {
        name: module
        for name, module in model.named_modules()
        if name and not any(unit in ("", name) or name.startswith(unit + ".") for unit in units)
    }
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator says nothing of its products
    try:
        with (
            intercepted(outside, lambda name, call, args, kwargs: counted(counter, (name,), call, args, kwargs)),
            intercepted(units, lambda name, _, args, kwargs: runners[name](*args, **kwargs)),
            counter,
        ):
            forward(model, to_device(batch, model_device(model)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter


def counted(counter: MacCounter, place: Place, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """``call(*args, **kwargs)``, counted for ``place``."""
    with counter.at(place):
        return call(*args, **kwargs)
