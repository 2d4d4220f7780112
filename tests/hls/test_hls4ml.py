# SPDX-License-Identifier: Apache-2.0
"""Our layers inside hls4ml: what its compiled project predicts is the golden model, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ahcq_plugin.export import SpecError
from ahcq_plugin.hls import HLSOptions
from ahcq_plugin.hls.vectors import quantizer_values

OPTIONS = HLSOptions(pe=8, simd=4, out=4)


class Model(torch.nn.Module):
    """Every family: a CAG Linear, an HLUQ Linear, a plain one, Q.K^T and A.V with a table; each has its own inputs."""

    def __init__(self, leaves: dict[str, torch.nn.Module]):
        super().__init__()
        for name, leaf in leaves.items():
            setattr(self, name, leaf)
        self.names = list(leaves)

    def forward(self, first, second, third, query, key, weights, values):
        return (
            self.grouped(first),
            self.hluq(second),
            self.uniform(third),
            self.qk(query, key),
            self.av_table(weights, values),
        )


@pytest.mark.filterwarnings("ignore")
def test_predict_is_bit_equal_to_the_golden_model(cases, tmp_path) -> None:
    from ahcq_plugin.hls.hls4ml_layers import QuantizedMatmul, convert

    rows = {"grouped": 1, "hluq": 3, "uniform": 2, "qk": 5, "av_table": 4}
    leaves = {
        name: QuantizedMatmul(cases.make_layer(name).matmul, rows=count, options=OPTIONS)
        for name, count in rows.items()
    }
    model = Model(leaves)
    shapes, inputs = [], []
    for leaf in leaves.values():
        operands = [leaf.matmul.left, leaf.matmul.right]
        for shape, operand in zip(leaf.input_shapes(), operands, strict=False):
            values = quantizer_values(operand, 40 * int(np.prod(shape[:-1])), shape[-1], seed=len(shapes))
            shapes.append(shape)
            inputs.append(np.clip(values, -1e6, 1e6).reshape(40, *shape))
    project = convert(model, shapes, tmp_path / "project")
    project.compile()
    predicted = project.predict(inputs)
    wanted = model(*map(torch.from_numpy, inputs))
    assert len(predicted) == len(wanted) == 5
    for name, got, want in zip(leaves, predicted, wanted, strict=True):
        got = np.asarray(got, np.float32).reshape(want.shape)
        assert len(np.unique(got)) > 30, name
        np.testing.assert_array_equal(got.view(np.uint32), want.numpy().view(np.uint32), err_msg=name)


def test_wrong_shapes_and_rows_are_named(cases, tmp_path) -> None:
    from ahcq_plugin.hls.hls4ml_layers import QuantizedMatmul, convert

    leaf = QuantizedMatmul(cases.make_layer("uniform").matmul, options=OPTIONS)
    with pytest.raises(SpecError, match=r"takes inputs of shapes \[\(21,\)\], got \[\(20,\)\]"):
        convert(torch.nn.Sequential(leaf), [(20,)], tmp_path / "project")
    with pytest.raises(SpecError, match="`rows` must be an integer >= 1, got 0"):
        QuantizedMatmul(leaf.matmul, rows=0)
