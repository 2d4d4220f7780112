# SPDX-License-Identifier: Apache-2.0
"""Weights of at most 4 bits as INT4 tensors, in an ONNX file that has them as INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np

INT4_BITS = 4
OPSET = 21  # the first with INT4; but for types it has the operators of 20


def pack_weights(path: str | Path) -> None:
    """Rewrite the file: codes and zero points of every DequantizeLinear that fit become INT4, two to a byte.

    Codes are stored at the opset that ``export_onnx`` writes; the model is converted to opset 21.
    """
    import onnx

    model = onnx.version_converter.convert_version(onnx.load(str(path)), OPSET)
    del model.graph.value_info[:]  # of the converter
    narrow = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for node in model.graph.node:
        pair = [stored[name] for name in node.input if name in stored]
        if node.op_type != "DequantizeLinear" or len(pair) != 2:
            continue
        codes = [onnx.numpy_helper.to_array(tensor) for tensor in pair]
        if all(_fits(array) for array in codes):
            for tensor, array in zip(pair, codes, strict=True):
                tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(narrow), tensor.name))
    onnx.save(model, str(path))


def _fits(codes: np.ndarray) -> bool:
    half = 2 ** (INT4_BITS - 1)
    return codes.size == 0 or (codes.min() >= -half and codes.max() < half)
