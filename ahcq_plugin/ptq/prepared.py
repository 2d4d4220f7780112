# SPDX-License-Identifier: Apache-2.0
"""Handles on a prepared model: its quantizers and weight layers, switching them, watching what is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from ahcq_plugin.quantizers import AdaRoundFakeQuantize, FakeQuantize
from ahcq_plugin.quantizers.base import MODES, ResizingStateMixin
from ahcq_plugin.quantizers.layers import QuantLinearView, read_parameters

M = TypeVar("M", bound=nn.Module)


class StopForward(Exception):
    """Ends a model's forward once what was wanted of it is known; who raises it in a unit or a hook catches it."""


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """(name, fake quantizer) of every quantizer in the model."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            yield name, module


def is_weight(quantizer: FakeQuantize) -> bool:
    """Whether the quantizer quantizes a weight."""
    return isinstance(quantizer, AdaRoundFakeQuantize)


def activation_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantize]]:
    """(name, quantizer) of every quantizer that is not a weight's."""
    return [(name, quantizer) for name, quantizer in quantizers(model) if not is_weight(quantizer)]


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a weight quantizer, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight_fake_quant", None), FakeQuantize)}


def set_quantization(model: nn.Module, weights: bool, activations: bool | None = None) -> None:
    """Switch fake quantization on or off; with both off the prepared model computes in floating point.

    Args:
        activations: None: as ``weights``.
    """
    for _, quantizer in quantizers(model):
        quantizer.enable_fake_quant(weights if is_weight(quantizer) or activations is None else activations)


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, layers whose weight was transformed (ACNR) compute with the one they came with."""
    layers = [layer for layer in weight_layers(model).values() if layer.original_weight is not None]
    parts = {layer: layer.weight.detach().clone() for layer in layers if isinstance(layer, QuantLinearView)}
    whole = {layer: layer.weight.data for layer in layers if layer not in parts}
    try:
        for layer in whole:
            layer.weight.data = layer.original_weight.to(layer.weight.device)
        for layer in parts:  # values, since its weight is rows of a larger parameter
            layer.weight.data.copy_(layer.original_weight)
        yield
    finally:
        for layer, weight in whole.items():
            layer.weight.data = weight
        for layer, weight in parts.items():
            layer.weight.data.copy_(weight)


@contextmanager
def observing(model: nn.Module, observed: Sequence[FakeQuantize]) -> Iterator[None]:
    """Quantization off, the observers of ``observed`` fresh and on; the modes are restored at the end."""
    saved = [(q, q.observing, q.quantizing) for _, q in quantizers(model)]
    try:
        for _, quantizer in quantizers(model):
            quantizer.enable_fake_quant(False)
        for quantizer in observed:
            quantizer.activation_post_process.reset()
            quantizer.enable_observer()
        yield
    finally:
        for quantizer, observer_on, quantize_on in saved:
            quantizer.enable_observer(observer_on)
            quantizer.enable_fake_quant(quantize_on)


@contextmanager
def training_only(model: nn.Module, learned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the context, of all parameters that are there only the ``learned`` ones are trained."""
    flags = {parameter: parameter.requires_grad for parameter in [*read_parameters(model), *learned]}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter in learned:
            parameter.grad = None


@contextmanager
def quantization_off(model: nn.Module) -> Iterator[None]:
    """Within the context all fake quantization is off; the modes are restored at the end."""
    saved = [(quantizer, quantizer.quantizing) for _, quantizer in quantizers(model)]
    try:
        set_quantization(model, False)
        yield
    finally:
        for quantizer, flag in saved:
            quantizer.enable_fake_quant(flag)


@contextmanager
def intercepted(units: dict[str, nn.Module], handler: Callable) -> Iterator[None]:
    """Within the context, calling unit ``name`` returns ``handler(name, forward, args, kwargs)``."""
    try:
        for name, unit in units.items():
            unit.forward = lambda *args, _name=name, _forward=unit.forward, **kwargs: handler(
                _name, _forward, args, kwargs
            )
        yield
    finally:
        for unit in units.values():
            unit.__dict__.pop("forward", None)


@contextmanager
def watched(modules: Mapping[str, M], note: Callable[[str, M, Any, Any], object]) -> Iterator[None]:
    """Within the context, every call of a module is told to ``note(name, module, input, output)``.

    Args:
        modules: by the name to note them with.
        note: gets the first argument of the call, positional or by keyword, and what it returned; what the note itself
            returns has no effect.
    """

    def hook(name: str) -> Callable[[M, tuple, dict, Any], None]:
        def tell(module: M, args: tuple, kwargs: dict, out: Any) -> None:
            note(name, module, [*args, *kwargs.values()][0], out)  # not returned: that would replace the output

        return tell

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def resizing(model: nn.Module) -> set[str]:
    """Names of the tensors whose shape is known only after calibration."""
    every = model.named_modules(remove_duplicate=False)  # the state names a module by every path to it
    own = {name for name, module in every if isinstance(module, ResizingStateMixin)}
    names = (name for name in model.state_dict() if name.rpartition(".")[0] in own)
    return {name for name in names if name.rpartition(".")[2] not in MODES}
