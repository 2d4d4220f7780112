# SPDX-License-Identifier: Apache-2.0
"""Observe the floating-point model on calibration data and set every quantizer's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ahcq_plugin.ptq.batches import Forward, check_batches, default_forward, model_device, to_device
from ahcq_plugin.ptq.prepare import is_weight, quantizers, weight_layers


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Activation observers on, quantization off; commits only if the body succeeds, restores the modes always."""
    chosen = [(name, q) for name, q in quantizers(model) if not is_weight(q)]
    saved = [(q, q.observing, q.quantizing) for _, q in quantizers(model)]
    try:
        for _, quantizer in quantizers(model):
            quantizer.enable_fake_quant(False)
        for _, quantizer in chosen:
            quantizer.activation_post_process.reset()
            quantizer.enable_observer()
        yield
        for name, quantizer in chosen:
            _commit(name, quantizer)
    finally:
        for quantizer, observer_on, quantize_on in saved:
            quantizer.enable_observer(observer_on)
            quantizer.enable_fake_quant(quantize_on)


def _commit(name: str, quantizer) -> None:
    try:
        quantizer.commit()
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Any], forward: Forward | None = None, progress: bool = True) -> None:
    """Set the parameters of all quantizers of a prepared model: weights from the weights, activations from the batches.

    Observers start afresh. Afterwards the model still computes in floating point; ``set_quantization`` or ``freeze``
    switch quantization on.

    Args:
        batches: sequence of items; each goes through ``forward(model, batch)``.
    Raises:
        RuntimeError: a quantizer saw no data; nothing is committed for activations in that case if it was the first.
    """
    check_batches(batches)
    forward = forward or default_forward
    layers = weight_layers(model)
    for name, layer in tqdm(layers.items(), desc="calibrate weights", unit="layer", disable=not progress):
        quantizer = layer.weight_fake_quant
        quantizer.activation_post_process.reset()
        quantizer.activation_post_process(layer.weight)
        _commit(name, quantizer)
    device = model_device(model)
    with observing(model):
        for batch in tqdm(batches, desc="calibrate activations", unit="item", disable=not progress):
            forward(model, to_device(batch, device))
