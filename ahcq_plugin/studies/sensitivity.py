# SPDX-License-Identifier: Apache-2.0
"""What the quantization of each role alone does to a model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ahcq_plugin.ptq.audit import AuditError, audit
from ahcq_plugin.ptq.calibrate import calibrate
from ahcq_plugin.ptq.freeze import freeze
from ahcq_plugin.ptq.precondition import precondition
from ahcq_plugin.ptq.prepare import prepare
from ahcq_plugin.ptq.prepared import is_weight, original_weights, quantizers, set_quantization
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, check_batches, default_forward, model_device, to_device


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

    With ACNR the weights it changed count as part of the quantization of weights. In the end the model is frozen, its
    quantizers are off.

    Args:
        calibration, held_out: items for the quantizers and for the comparison.
        agreement: of an output with the floating-point output of the same item, one number or one per object.
    Returns:
        "part role" (``image_encoder q``, ``mask_decoder weight``, ...) -> mean agreement over all numbers of
        ``held_out``, in the order of the model; at last "everything".
    Raises:
        TypeError, ValueError: items that are no sequence, or none.
        AuditError: the model with everything quantized fails its audit.
    """
    check_batches(calibration)
    check_batches(held_out)
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

    def mean_agreement() -> float:
        values = [agreement(forward(model, item), out) for item, out in zip(items, expected, strict=True)]
        return float(torch.cat([value.reshape(-1).float().cpu() for value in values]).mean())

    agreements = {}
    for group, members in tqdm(groups.items(), desc="sensitivity", unit="role", disable=not progress):
        with nullcontext() if is_weight(members[0]) else original_weights(model):
            for quantizer in members:
                quantizer.enable_fake_quant()
            agreements[group] = mean_agreement()
        for quantizer in members:
            quantizer.enable_fake_quant(False)
    report = audit(freeze(model), items[0], forward)
    if not report.passed:
        raise AuditError(report)
    agreements["everything"] = mean_agreement()
    set_quantization(model, False)
    return agreements
