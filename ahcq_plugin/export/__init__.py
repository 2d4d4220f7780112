# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to layer specs, integer tensors and an integer golden model; to ONNX graphs and back to masks.

Names are imported on first use: what reads specs or runs graphs needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ahcq_plugin.export.from_model import export_spec, make_spec
    from ahcq_plugin.export.matmul import Matmul, Patches, Unsupported
    from ahcq_plugin.export.onnx_graphs import export_onnx
    from ahcq_plugin.export.onnx_sam import OnnxSam
    from ahcq_plugin.export.onnx_sam2 import OnnxSam2
    from ahcq_plugin.export.onnx_sam2_video import Video
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
    "OnnxSam",
    "OnnxSam2",
    "Patches",
    "PerHeadOperand",
    "Spec",
    "SpecError",
    "Step",
    "TableOperand",
    "UniformOperand",
    "UnitSpec",
    "Unsupported",
    "Video",
    "WeightOperand",
    "export_onnx",
    "export_spec",
    "load_spec",
    "make_spec",
    "save_spec",
]

_HOMES = {
    "from_model": ("export_spec", "make_spec"),
    "matmul": ("Matmul", "Patches", "Unsupported"),
    "onnx_graphs": ("export_onnx",),
    "onnx_sam": ("OnnxSam",),
    "onnx_sam2": ("OnnxSam2",),
    "onnx_sam2_video": ("Video",),
    "spec": ("Spec", "Step", "UnitSpec"),
    "spec_io": ("load_spec", "save_spec"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'operands')}"), name)
