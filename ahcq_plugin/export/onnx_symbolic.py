# SPDX-License-Identifier: Apache-2.0
"""What torch's exporter to ONNX translates wrongly, translated rightly while one export runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.onnx import symbolic_helper


@contextmanager
def mended_symbolics(opset: int) -> Iterator[None]:
    """Inside, ``movedim`` exports with dimensions that count from the end: torch writes them into the ``perm`` of
    Transpose as they are, which runtimes refuse."""
    torch.onnx.register_custom_op_symbolic("aten::movedim", _movedim, opset)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::movedim", opset)


@symbolic_helper.parse_args("v", "t", "t")
def _movedim(g: Any, tensor: Any, source: Tensor, destination: Tensor) -> Any:
    rank = symbolic_helper._get_tensor_rank(tensor)
    pairs = zip(destination.reshape(-1).tolist(), source.reshape(-1).tolist(), strict=True)
    places = {to % rank: origin % rank for to, origin in pairs}
    rest = iter([axis for axis in range(rank) if axis not in places.values()])
    return g.op("Transpose", tensor, perm_i=[places[axis] if axis in places else next(rest) for axis in range(rank)])
