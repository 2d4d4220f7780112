# SPDX-License-Identifier: Apache-2.0
"""What torch's exporter translates wrongly comes out right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from ahcq_plugin.export.onnx_graphs import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")


class _Moved(nn.Module):
    def __init__(self, source, destination):
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.destination) + 0


@pytest.mark.parametrize("source, destination", [(-3, -2), (-2, 0), (0, -2), (1, 3), ((0, -1), (-2, 0)), (1, 1)])
def test_dimensions_are_moved_as_torch_moves_them_counted_from_either_end(source, destination, tmp_path):
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    model = _Moved(source, destination)
    export_onnx(model, tmp_path / "moved.onnx", (x,), style="float")
    session = onnxruntime.InferenceSession(str(tmp_path / "moved.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], model(x).numpy())


class _Several(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        return first + rest[1]


def test_inputs_of_a_star_are_called_by_their_number(tmp_path):
    """Those that nothing reads are left out, so that the others must have names of their own."""
    export_onnx(_Several(), tmp_path / "several.onnx", tuple(torch.ones(n) for n in (1, 2, 3)), style="float")
    session = onnxruntime.InferenceSession(str(tmp_path / "several.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("first", [1]), ("rest_1", [3])]
    with pytest.raises(ValueError, match=r"none: \['rest'\]; inputs: \['first', 'rest_0'\]"):
        dynamic = {"rest": {0: "n"}}
        export_onnx(_Several(), tmp_path / "several.onnx", (torch.ones(1),) * 2, dynamic, style="float")


class _Turned(nn.Module):
    """Rotary positions as SAM 3's encoder has them: complex factors, and sizes asked of complex tensors."""

    def __init__(self, factors_first: bool):
        super().__init__()
        self.factors_first = factors_first
        self.register_buffer("factors", torch.polar(torch.ones(5, 4), torch.arange(20.0).view(5, 4)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = self.factors * pairs if self.factors_first else pairs * self.factors
        return torch.view_as_real(turned).flatten(2) * pairs.shape[-1] + pairs.ndim


@pytest.mark.parametrize("factors_first", [False, True])
def test_products_with_complex_constants_are_real_in_the_graph_alone(factors_first, tmp_path):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    model = fx.symbolic_trace(_Turned(factors_first))
    wanted = model(x)
    export_onnx(model, tmp_path / "turned.onnx", (x,), style="float")
    session = onnxruntime.InferenceSession(str(tmp_path / "turned.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted.numpy(), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), wanted) and any(n.target is torch.view_as_complex for n in model.graph.nodes)
