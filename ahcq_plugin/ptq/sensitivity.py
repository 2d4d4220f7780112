# SPDX-License-Identifier: Apache-2.0
"""What the quantization of each role alone does to a model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.ptq.batches import Forward, default_forward, model_device, to_device
from ahcq_plugin.ptq.calibrate import calibrate
from ahcq_plugin.ptq.precondition import precondition
from ahcq_plugin.ptq.prepare import is_weight, prepare, quantizers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import FakeQuantize


@torch.no_grad()
def role_sensitivity(
    model: nn.Module,
    calibration: Sequence[Any],
    held_out: Sequence[Any],
    recipe: Recipe,
    agreement: Callable[[Any, Any], Tensor],
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Calibrate ``model`` (prepared in place, nothing is reconstructed) and quantize one role of one part at a time.

    Args:
        calibration, held_out: items for the quantizers and for the comparison.
        agreement: of an output with the floating-point output of the same item, one number or one per object.
    Returns:
        "part role" (``image_encoder q``, ``mask_decoder weight``, ...) -> mean agreement over all numbers of
        ``held_out``, in the order of the model; at last "everything".
    """
    forward = forward or default_forward
    items = [to_device(item, model_device(model)) for item in held_out]
    expected = [forward(model, item) for item in items]
    prepare(model, recipe)
    precondition(model, calibration, recipe, forward, progress)
    calibrate(model, calibration, forward, progress)
    groups: dict[str, list[FakeQuantize]] = {}
    for name, quantizer in quantizers(model):
        quantizer.finish()
        role = "weight" if is_weight(quantizer) else quantizer.role
        groups.setdefault(f"{name.split('.')[0]} {role}", []).append(quantizer)
    groups["everything"] = [quantizer for members in list(groups.values()) for quantizer in members]
    found = {}
    for group, members in tqdm(groups.items(), desc="sensitivity", unit="role", disable=not progress):
        for quantizer in members:
            quantizer.enable_fake_quant()
        values = [agreement(forward(model, item), out) for item, out in zip(items, expected, strict=True)]
        found[group] = float(torch.cat([value.reshape(-1).float().cpu() for value in values]).mean())
        for quantizer in members:
            quantizer.enable_fake_quant(False)
    return found
