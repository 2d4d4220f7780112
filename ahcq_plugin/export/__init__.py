# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to layer specs, integer tensors and an integer golden model."""

from ahcq_plugin.export.from_model import export_spec, make_spec
from ahcq_plugin.export.matmul import Matmul, Patches, Unsupported
from ahcq_plugin.export.onnx_graphs import export_onnx
from ahcq_plugin.export.onnx_sam import OnnxSam
from ahcq_plugin.export.operands import (
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    UniformOperand,
    WeightOperand,
)
from ahcq_plugin.export.spec import Spec, Step, UnitSpec
from ahcq_plugin.export.spec_io import load_spec, save_spec

__all__ = [
    "GroupedOperand",
    "HLUQOperand",
    "Matmul",
    "Patches",
    "OnnxSam",
    "PerHeadOperand",
    "Spec",
    "SpecError",
    "Step",
    "TableOperand",
    "UniformOperand",
    "UnitSpec",
    "Unsupported",
    "WeightOperand",
    "export_onnx",
    "export_spec",
    "load_spec",
    "make_spec",
    "save_spec",
]
