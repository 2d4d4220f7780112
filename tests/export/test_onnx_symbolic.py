# SPDX-License-Identifier: Apache-2.0
"""What torch's exporter translates wrongly comes out right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
