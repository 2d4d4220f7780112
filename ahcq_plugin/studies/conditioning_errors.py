# SPDX-License-Identifier: Apache-2.0
"""What a smaller condition number does to a layer's output: less from the input's error, or more from the weight's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.ptq.prepared import activation_quantizers, original_weights, set_quantization, watched, weight_layers
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.studies.paper_figures import save_figure
from ahcq_plugin.support.batches import Forward, check_batches, default_forward, model_device, to_device

LEAST_ERROR = 1e-12  # errors below are drawn here


@dataclass(frozen=True)
class ConditioningError:
    """Squared errors of a Linear layer's output by its squared size, over all items; the reference is the output for
    the floating-point input with the weight that the model came with.

    Attributes:
        layer: its name.
        inputs: the input quantized.
        weight: the weight changed.
        both: the input quantized and the weight changed.
        rounded_before, rounded_after: the input quantized, the weight rounded to nearest, without and with the change.
    """

    layer: str
    inputs: float
    weight: float
    both: float
    rounded_before: float
    rounded_after: float


@torch.no_grad()
def conditioning_errors(
    model: nn.Module, batches: Sequence[Any], forward: Forward | None = None
) -> list[ConditioningError]:
    """One line per layer whose weight ``precondition`` changed, in the model's order.

    Args:
        model: prepared, conditioned, its activations calibrated; quantization is switched off.
    Raises:
        TypeError, ValueError: items that are no sequence, or none.
    """
    check_batches(batches)
    forward = forward or default_forward
    feeding = {layer: quantizer for _, quantizer in activation_quantizers(model) for layer in quantizer.consumers}
    layers = {n: layer for n, layer in weight_layers(model).items() if layer.original_weight is not None}
    variants = {name: _variants(layer) for name, layer in layers.items()}
    sums = {name: torch.zeros(6, dtype=torch.float64) for name in layers}

    def measure(name: str, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        quantizer = feeding[layer]
        x_hat = quantizer.decode(quantizer.encode(x)).to(x.dtype)
        changed, *rounded = variants[name]
        outputs = [F.linear(x_hat, layer.weight, layer.bias), F.linear(x, changed, layer.bias)]
        outputs += [F.linear(x_hat, weight, layer.bias) for weight in (changed, *rounded)]
        signal = out if layer.bias is None else out - layer.bias
        errors = [signal, *(output - out for output in outputs)]
        sums[name] += torch.stack([error.double().square().sum() for error in errors]).cpu()

    set_quantization(model, False)
    with watched(layers, measure), original_weights(model):
        for batch in batches:
            forward(model, to_device(batch, model_device(model)))
    return [ConditioningError(name, *(row[1:] / row[0].clamp(min=1e-300)).tolist()) for name, row in sums.items()]


def _variants(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The changed weight, the original one rounded to nearest, the changed one rounded to nearest."""
    changed = layer.weight.detach().clone()

    def rounded(weight: Tensor) -> Tensor:
        quantizer: FakeQuantize = type(layer.weight_fake_quant)(quant_max=layer.weight_fake_quant.quant_max)
        quantizer.to(weight.device).observe(weight)
        quantizer.commit()
        return quantizer.decode(quantizer.encode(weight)).to(weight.dtype)

    return changed, rounded(layer.original_weight.to(changed.device)), rounded(changed)


def draw_conditioning(
    model: nn.Module, batches: Sequence[Any], folder: str | Path, forward: Forward | None = None
) -> dict[str, float]:
    """Write ``conditioning.png``, the errors of ``conditioning_errors`` (arguments as there).

    Returns: number of ``conditioned layers``; geometric means over them of what ACNR multiplies the error of the output
    by: ``conditioned error`` with the weights in floating point, ``conditioned error, rounded`` with rounded ones.
    """
    errors = conditioning_errors(model, batches, forward)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {
        "(a) weights in floating point": {"input": "inputs", "weight changed": "weight", "both": "both"},
        "(b) weights rounded to nearest": {"without ACNR": "rounded_before", "with ACNR": "rounded_after"},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for label, name in lines.items():
            values = [max(getattr(error, name), LEAST_ERROR) for error in errors]
            axes.plot(values, "o-", markersize=3, linewidth=0.7, label=label)
        axes.set(yscale="log", title=title, xlabel="layer changed by ACNR", ylabel="squared error / size of output")
        axes.legend(fontsize=7)
    save_figure(figure, Path(folder) / "conditioning.png")
    return {
        "conditioned layers": len(errors),
        "conditioned error": _mean_ratio(errors, "both", "inputs"),
        "conditioned error, rounded": _mean_ratio(errors, "rounded_after", "rounded_before"),
    }


def _mean_ratio(errors: Sequence[ConditioningError], one: str, other: str) -> float:
    ratios = [max(getattr(e, one), LEAST_ERROR) / max(getattr(e, other), LEAST_ERROR) for e in errors]
    return statistics.geometric_mean(ratios) if ratios else 1.0
