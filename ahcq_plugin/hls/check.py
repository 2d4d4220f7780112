# SPDX-License-Identifier: Apache-2.0
"""Generated C++ beside the golden model on the codes that a quantized model really has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export import golden
from ahcq_plugin.export.interpret import Call, interpreted, row_codes
from ahcq_plugin.export.matmul import heads_of
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.hls.csim import CompiledLayer
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.vectors import Vectors


@dataclass
class CheckedLayer:
    """What one layer did on real codes.

    Attributes:
        calls, rows: how many calls and rows ran.
        accumulators, outputs: how many integers and float32 numbers were compared.
        different: how many of them differ from the golden model.
    """

    calls: int = 0
    rows: int = 0
    accumulators: int = 0
    outputs: int = 0
    different: int = 0


def layer_vectors(layer: Layer, call: Call) -> Vectors:
    """The codes of ``call`` as a launch of the layer takes them: (batch, rows, k) and the right operand."""
    matmul = layer.matmul
    left = row_codes(matmul, call.left)
    left = left.reshape(-1, *left.shape[-2:]) if layer.is_product else left[None]
    if call.right is None:
        return Vectors(left)
    right = call.right.cpu().numpy()
    right = np.swapaxes(right, -1, -2) if matmul.kind == "qk" else right
    return Vectors(left, right.reshape(-1, *right.shape[-2:]))


@torch.no_grad()
def check_on_model(
    qmodel: nn.Module,
    compiled: Mapping[str, CompiledLayer],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    accumulator_rows: int = 64,
) -> dict[str, CheckedLayer]:
    """Run the frozen ``qmodel`` on ``batches``; every call of every layer also runs in C++ and in the golden model.

    Args:
        compiled: layers by top name, from ``compile_generated``.
        accumulator_rows: rows of each call whose accumulators are compared too; outputs always are, all of them.
    Returns:
        By top name.
    """
    functions = {(function.layer.unit, function.layer.matmul.name): function for function in compiled.values()}
    rows = {top: CheckedLayer() for top in compiled}

    def on_matmul(unit: str, call: Call) -> Tensor:
        function = functions.get((unit, call.site.node.name))
        if function is not None:
            vectors, row = layer_vectors(function.layer, call), rows[function.layer.top]
            _compare(row, function, vectors, accumulators=False)
            some = 2 * heads_of(function.layer.matmul.left, function.layer.matmul.right)
            right = None if vectors.right is None else vectors.right[:some]
            part = Vectors(vectors.left[:some, :accumulator_rows], right)
            _compare(row, function, part, accumulators=True)
        return call.float_output()

    units = {name: unit for name, unit in prepared_units(qmodel).items() if any(name == key[0] for key in functions)}
    with interpreted(units, on_matmul):
        for batch in batches:
            forward(qmodel, batch)
    return rows


def _compare(row: CheckedLayer, function: CompiledLayer, vectors: Vectors, accumulators: bool) -> None:
    got = function.run(vectors.left, vectors.right, accumulators=accumulators)
    golden_result = golden.run(function.layer.matmul, vectors.left, vectors.right)
    row.different += int((got.output.view(np.uint32) != golden_result.output.view(np.uint32)).sum())
    if accumulators:
        row.different += int((got.accumulators != golden_result.accumulators).sum())
        row.accumulators += got.accumulators.size
        return
    row.calls += 1
    row.rows += vectors.left.shape[0] * vectors.left.shape[1]
    row.outputs += got.output.size
