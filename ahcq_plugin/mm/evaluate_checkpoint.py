# SPDX-License-Identifier: Apache-2.0
"""What ``tools/evaluate.py`` does: a quantized model measured on the test data of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.device import get_device
from rich.console import Console

from ahcq_plugin import load_quantized
from ahcq_plugin.integer import to_integer
from ahcq_plugin.mm.config_file import read_config
from ahcq_plugin.mm.launch import build_runner, override_loop
from ahcq_plugin.mm.readers import safe_readers
from ahcq_plugin.ptq import AuditError, audit
from ahcq_plugin.ptq.prepare import recipe_in
from ahcq_plugin.support.files import write_json


@safe_readers()
def evaluate_checkpoint(
    config: str,
    checkpoint: str | Path,
    integer: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Figures of a quantized model on the test data of a PTQ config.

    Args:
        config: of a run of ``tools/ptq.py``; its SAM is what ``checkpoint`` is of.
        checkpoint: what ``quantize`` wrote.
        integer: compute on integers (``ahcq_plugin.integer``) instead of fake-quantized.
        work_dir: gets ``evaluation_integer.json`` or ``evaluation_fake.json``; default: the folder of ``checkpoint``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; default: cuda where there is one.
    Returns:
        The figures of ``metrics.json`` under ``quantized``, without distances to floating point.
    Raises:
        ValueError, FileNotFoundError: bad config, data or checkpoint.
        AuditError: the fake-quantized model fails the audit; nothing is measured then.
    """
    folder = Path(work_dir or Path(checkpoint).parent)
    cfg = read_config(config, cfg_options)
    cfg.work_dir = str(folder)
    override_loop(cfg, device=device)
    loop = build_runner(cfg, False, console or Console()).test_loop
    model = loop.wrap(loop.runner.model)
    model.sam = load_quantized(checkpoint, lambda state: model.sam)
    kind = "integer" if integer else "fake"
    model = model.to(loop.device or get_device()).eval()
    items, _ = loop.calibration(model, tune=False)
    outcome = audit(model.sam, items[0], loop.forward, recipe_in(model.sam))
    if not outcome.passed:
        raise AuditError(outcome)
    if integer:
        model.sam = to_integer(model.sam)
    metrics = loop.evaluate(model, loop.read(model), None, f"{kind} evaluation").metrics
    write_json({"checkpoint": str(checkpoint), "integer": integer, **metrics}, folder / f"evaluation_{kind}.json")
    return metrics
