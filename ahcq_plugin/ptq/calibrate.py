# SPDX-License-Identifier: Apache-2.0
"""Observe the floating-point model on calibration data and set every quantizer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.graph import UnitError, prepared_units
from ahcq_plugin.ptq.focus import clip_by_focus
from ahcq_plugin.ptq.heads import lay_out_heads
from ahcq_plugin.ptq.prepared import activation_quantizers, intercepted, observing, weight_layers
from ahcq_plugin.ptq.score import ProductRunner
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import (
    Forward,
    check_batches,
    check_item,
    default_forward,
    model_device,
    naming_item,
    to_device,
)
from ahcq_plugin.support.workers import ALONE, Workers


@contextmanager
def exchanged(model: nn.Module, items: int, workers: Workers) -> Iterator[Callable[[], None]]:
    """Within the context, what activation quantizers observe and judge is put down by item instead of counted; at the
    end every process counts what all put down, in the order of the items. One process alone counts at once.

    Gives a function to be called before each item of this process's share.
    """
    if workers.size == 1:
        yield lambda: None
        return
    named = activation_quantizers(model)
    notes: dict[FakeQuantize, list[list]] = {quantizer: [] for _, quantizer in named}

    def put_down(quantizer: FakeQuantize, kind: str, note: Callable[..., Any]) -> Callable[..., None]:
        def handle(x: Tensor, *args: Any) -> None:
            if x.numel():
                notes[quantizer][-1].append((kind, note(x, *args)))

        return handle

    def next_item() -> None:
        for of_items in notes.values():
            of_items.append([])

    try:
        for _, quantizer in named:
            quantizer.observe = put_down(quantizer, "seen", partial(_summary, quantizer))
            quantizer.score = put_down(quantizer, "judged", quantizer.judge)
        yield next_item
    finally:
        for _, quantizer in named:
            del quantizer.observe, quantizer.score
    device = model_device(model)
    for _, quantizer in named:
        count = {"seen": quantizer.activation_post_process.absorb, "judged": quantizer.add_errors}
        for of_item in workers.in_order(notes.pop(quantizer), items):
            for kind, note in of_item:
                count[kind](to_device(note, device))


def _summary(quantizer: FakeQuantize, x: Tensor) -> tuple:
    return quantizer.activation_post_process.summary(quantizer.observed(x), ahead=True)


def _named(name: str, call: Callable[[], Any]) -> Any:
    """``call()``, whose errors then name the quantizer."""
    try:
        return call()
    except RuntimeError as error:
        raise UnitError(f"{name}: {error}") from error


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> None:
    """Set the parameters of all quantizers of a prepared model: weights from the weights, activations from the batches.

    Observers start afresh. Afterwards the model still computes in floating point; ``set_quantization`` or ``freeze``
    switch quantization on.

    Args:
        batches: sequence of items; each goes through ``forward(model, batch)`` once, and once more if a quantizer
            searches its parameters by the error of the product behind it. The first ones a few times more where
            ranges are chosen by the focus of attention (``ptq/focus.py``).
        workers: processes that share the items; their number changes no parameter.
    Raises:
        UnitError: a quantizer saw no data; nothing is committed for activations in that case if it was the first.
    """
    check_batches(batches)
    model_device(model)
    layers = weight_layers(model)
    for name, layer in tqdm(layers.items(), desc="calibrate weights", unit="layer", disable=not progress):
        calibrate_weight(name, layer)
    calibrate_activations(model, batches, forward, progress, workers)
    clip_by_focus(model, batches, forward or default_forward, progress, workers)


def calibrate_weight(name: str, layer: nn.Module) -> None:
    """Set the parameters of the weight quantizer of ``layer`` from its weight; errors name it ``name``."""
    quantizer = layer.weight_fake_quant
    quantizer.activation_post_process.reset()
    quantizer.activation_post_process(layer.weight)
    _named(name, quantizer.commit)


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
    wanted: Callable[[FakeQuantize], bool] = lambda quantizer: True,
) -> None:
    """The part of ``calibrate`` that sets the activation quantizers; those not ``wanted`` stay as they are."""
    forward = forward or default_forward
    chosen = {quantizer: name for name, quantizer in activation_quantizers(model) if wanted(quantizer)}
    device = model_device(model)

    def run(what: str) -> None:
        with exchanged(model, len(batches), workers) as next_item:
            for item in tqdm(workers.share(len(batches)), desc=what, unit="item", disable=not progress):
                next_item()
                with naming_item(f"batches[{item}]"):
                    batch = batches[item]
                    check_item(batch, f"batches[{item}]")
                    forward(model, to_device(batch, device))

    lay_out_heads(model, batches, forward, set(chosen))
    with observing(model, list(chosen)):
        run("calibrate activations")
        searching = {quantizer for quantizer, name in chosen.items() if _named(name, quantizer.begin_search)}
        for quantizer in chosen:
            quantizer.enable_observer(False)
        if searching:
            units = prepared_units(model)
            runners = {name: ProductRunner(unit, searching) for name, unit in units.items()}
            with intercepted(units, lambda name, _, args, kwargs: runners[name](*args, **kwargs)):
                run("search parameters")
        for quantizer, name in chosen.items():
            _named(name, quantizer.commit)
