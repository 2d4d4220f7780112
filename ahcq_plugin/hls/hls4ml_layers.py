# SPDX-License-Identifier: Apache-2.0
"""Exported matmuls as leaf modules of hls4ml: ``convert`` makes an hls4ml model of a torch model that holds them.

The C++ is that of ``generate``; it stands in the layer's configuration, beside the kernels in ``nnet_utils``. hls4ml's
pass to channels-last meets no tensor of ours; it is left off, because it would turn two-dimensional inputs around.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import hls4ml
import numpy as np
import torch
from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
from hls4ml.model.layers import Layer as HLS4MLLayer
from hls4ml.model.layers import layer_map, register_layer
from hls4ml.model.types import StandardFloatPrecisionType
from hls4ml.utils.torch import HLS4MLModule
from torch import Tensor

from ahcq_plugin.export import Matmul, SpecError, golden
from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.matmul import heads_of
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.texts import array_layer_text

BACKEND = "Vitis"
KERNELS = ("arrays", "attention", "beats", "dequantize", "layer", "linear", "operands", "quantize", "rows")


class QuantizedMatmul(HLS4MLModule):
    """A matmul of a spec as a leaf: floats in, quantized to codes, the integer matmul, floats out.

    Args:
        matmul: from a spec, or made by hand.
        rows: of the left operand.
        options: processing elements, their inputs a cycle, floats a beat.
    """

    def __init__(self, matmul: Matmul, rows: int = 1, options: HLSOptions | None = None):
        super().__init__()
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise SpecError(f"`rows` must be an integer >= 1, got {rows!r}")
        heads = heads_of(matmul.left, matmul.right)
        if heads > 1:
            raise SpecError(f"matmul '{matmul.name}' has operands of {heads} heads; a module here is one product")
        self.matmul, self.rows, self.options = matmul, rows, options or HLSOptions()

    def input_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs, without the batch."""
        matmul = self.matmul
        left = (self.rows, matmul.k) if self.rows > 1 or matmul.kind != "linear" else (matmul.k,)
        right = {"qk": [(matmul.n, matmul.k)], "av": [(matmul.k, matmul.n)]}
        return [left, *right.get(matmul.kind, [])]

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """What the golden model gives for floats (batch, *shape) of ``input_shapes``."""
        matmul = self.matmul
        left_codes = encode(matmul.left, left.detach().cpu().numpy())
        if right is None:
            return torch.from_numpy(golden.run(matmul, left_codes).output)
        return torch.from_numpy(golden.run(matmul, left_codes, encode(matmul.right, right.detach().numpy())).output)


class AhcqMatmul(HLS4MLLayer):
    """The layer in hls4ml's model; its output is float32 whatever the configuration says."""

    def initialize(self) -> None:
        """Declare the output."""
        self.add_output_variable(self.get_attr("output_shape"), precision=StandardFloatPrecisionType(32, 8))


class AhcqConfig(LayerConfigTemplate):
    """Writes parameters, weights and scales of a layer."""

    def __init__(self):
        super().__init__(AhcqMatmul)

    def format(self, node: HLS4MLLayer) -> str:
        """The text that ``array_layer_text`` made."""
        return node.get_attr("ahcq_text")


class AhcqCall(FunctionCallTemplate):
    """Writes the call of a layer."""

    def __init__(self):
        super().__init__(AhcqMatmul, include_header=["nnet_utils/arrays.h"])

    def format(self, node: HLS4MLLayer) -> str:
        """``linear_arrays`` of one input or ``product_arrays`` of two."""
        names = [node.get_input_variable(name).name for name in node.inputs] + [node.get_output_variable().name]
        function = "linear_arrays" if len(names) == 2 else "product_arrays"
        return f"ahcq::{function}<{node.get_attr('ahcq_top')}_layer::array_layer>({', '.join(names)});"


def register() -> None:
    """Make the layer known to hls4ml's backend Vitis; a second call does nothing."""
    if layer_map.get(AhcqMatmul.__name__) is AhcqMatmul:
        return
    hls4ml.converters.register_pytorch_layer_handler(QuantizedMatmul.__name__, _parse)
    register_layer(AhcqMatmul.__name__, AhcqMatmul)
    backend = hls4ml.backends.get_backend(BACKEND)
    backend.register_template(AhcqConfig)
    backend.register_template(AhcqCall)
    for name in KERNELS:
        backend.register_source(sources("include", "ahcq", f"{name}.h"))
    backend.register_source(sources("csim", "include", "ap_axi_sdata.h"))


def convert(model: torch.nn.Module, input_shapes: Sequence[tuple[int, ...]], folder: Path, **options: object):
    """The hls4ml model (backend Vitis, parallel arrays, float32) of ``model``; ``compile()`` and ``predict`` it.

    Args:
        input_shapes: of each input, without the batch.
        folder: where hls4ml writes its project.
        options: more arguments of ``hls4ml.converters.convert_from_pytorch_model``.
    """
    register()
    shapes = [(None, *shape) for shape in input_shapes]
    config = hls4ml.utils.config_from_pytorch_model(
        model,
        input_shape=shapes if len(shapes) > 1 else shapes[0],
        default_precision="float",
        channels_last_conversion="off",
        transpose_outputs=False,
        backend=BACKEND,
    )
    return hls4ml.converters.convert_from_pytorch_model(
        model, output_dir=str(folder), backend=BACKEND, io_type="io_parallel", hls_config=config, **options
    )


def _parse(operation, layer_name, input_names, input_shapes, node, module, reader, config):
    """hls4ml's handler of a ``QuantizedMatmul``: (attributes of the layer, shape of its output)."""
    wanted = module.input_shapes()
    got = [tuple(shape[1:]) for shape in input_shapes]
    if [int(np.prod(shape)) for shape in got] != [int(np.prod(shape)) for shape in wanted]:
        raise SpecError(f"`{layer_name}` takes inputs of shapes {wanted}, got {got}")
    layer = Layer("", dataclasses.replace(module.matmul, name=layer_name), module.options)
    shape = [*wanted[0][:-1], module.matmul.n]
    attributes = dict(
        class_name=AhcqMatmul.__name__,
        name=layer_name,
        inputs=input_names,
        output_shape=shape,
        ahcq_top=layer.top,
        ahcq_text=array_layer_text(layer, module.rows),
    )
    return attributes, [None, *shape]
