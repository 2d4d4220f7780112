# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of a model, stage by stage: prepare, calibrate, reconstruct, freeze, tune, audit."""

from ahcq_plugin.ptq.audit import AuditError, AuditReport, audit
from ahcq_plugin.ptq.calibrate import calibrate
from ahcq_plugin.ptq.checkpoint import Checkpoint, read_checkpoint, save_checkpoint, save_packed
from ahcq_plugin.ptq.freeze import freeze
from ahcq_plugin.ptq.precondition import precondition
from ahcq_plugin.ptq.prepare import prepare, prepare_unit
from ahcq_plugin.ptq.prepared import quantizers, set_quantization
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.reconstruct import reconstruct
from ahcq_plugin.ptq.resume import ResumeError, UnitReport
from ahcq_plugin.ptq.tune import TuneReport, floating_outputs, tune

__all__ = [
    "AuditError",
    "AuditReport",
    "Checkpoint",
    "Recipe",
    "ResumeError",
    "TuneReport",
    "UnitReport",
    "audit",
    "calibrate",
    "floating_outputs",
    "freeze",
    "precondition",
    "prepare",
    "prepare_unit",
    "quantizers",
    "read_checkpoint",
    "reconstruct",
    "save_checkpoint",
    "save_packed",
    "set_quantization",
    "tune",
]
