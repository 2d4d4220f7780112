# SPDX-License-Identifier: Apache-2.0
"""Our engine on what MQBench prepared for ``AHCQ_BACKEND``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ahcq_plugin import ptq
from ahcq_plugin.mqbench.backend import recipe_of
from ahcq_plugin.ptq.resume import UnitReport
from ahcq_plugin.support.batches import Forward


@torch.no_grad()
def calibrate(
    model: nn.Module, cali_data: Sequence[Any], forward: Forward | None = None, progress: bool = True
) -> None:
    """Instead of ``enable_calibration`` and a loop over the data: observers start afresh, and a second pass lets HLUQ,
    LNQ and AGQ choose by the error of what follows them. Quantizers get their final form (CAG its groups), so that
    ``enable_quantization`` or ``ptq_reconstruction`` can come next.

    Args:
        cali_data: sequence of items; each goes through ``forward(model, item)`` once or twice.
    Raises:
        ValueError: ``model`` was not prepared for ``AHCQ_BACKEND``.
    """
    recipe_of(model)
    ptq.calibrate(model.eval(), cali_data, forward, progress)
    for _, quantizer in ptq.quantizers(model):
        quantizer.finish()


def reconstruct(
    model: nn.Module,
    cali_data: Sequence[Any],
    forward: Forward | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[UnitReport]:
    """Instead of calibration and ``ptq_reconstruction``: two-pass calibration, reconstruction unit by unit and hard
    rounding by our engine, in place; afterwards the model computes quantized.

    A unit is a GraphModule that MQBench prepared: ``model`` itself, or the blocks inside it. What is learned, and for
    how many iterations, stands in the recipe of ``prepare_by_platform``.

    Args, Returns: as :func:`ahcq_plugin.ptq.reconstruct`.
    Raises:
        ValueError: ``model`` was not prepared for ``AHCQ_BACKEND``, or ``resume`` finds another run.
    """
    recipe = recipe_of(model)
    ptq.calibrate(model.eval(), cali_data, forward, progress)
    reports = ptq.reconstruct(model, cali_data, recipe, forward, work_dir, resume, progress)
    ptq.freeze(model)
    return reports
