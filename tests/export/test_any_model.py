# SPDX-License-Identifier: Apache-2.0
"""Quantized models of any kind are compiled, exported and run in onnxruntime, and give the same."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch

from ahcq_plugin import load_quantized, quantize
from ahcq_plugin.export import export_onnx
from tests.graph.test_calls import WIDTH, Block, Net, make, tokens

RECIPES = [pytest.param("rtn", marks=pytest.mark.slow), "ahcq", pytest.param("ptq4sam", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RECIPES)
def quantized(request, tmp_path_factory):
    """(model, its file, how it is built, an item)."""
    folder = tmp_path_factory.mktemp("run")
    net, item = make("keywords passed on")
    model, _ = quantize(net, [(item,)], request.param, 4, 4, iterations=2, work_dir=folder, progress=False)
    return model, folder / "quantized.pth", lambda state: make("keywords passed on")[0], item


def forms(quantized):
    """As it came, copied, and loaded without having run since."""
    model, file, build, _ = quantized
    return model, copy.deepcopy(model), load_quantized(file, build)


@torch.no_grad()
def test_torch_export_gives_the_same_bits(quantized):
    item = quantized[-1]
    expected = quantized[0](item)
    for model in forms(quantized):
        assert torch.equal(torch.export.export(model, (item,)).module()(item), expected)


def check_compiled(quantized, backend):
    item = quantized[-1]
    for model in forms(quantized):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for x in (item, tokens(1, 5, WIDTH, seed=9)):
            with torch.no_grad():
                assert torch.equal(compiled(x), model(x))


def test_torch_compile_captures_one_graph_with_the_same_bits(quantized):
    check_compiled(quantized, "aot_eager")


@pytest.mark.slow
def test_inductor_gives_the_same_bits(quantized):
    check_compiled(quantized, "inductor")


@torch.no_grad()
def test_onnxruntime_gives_the_same_up_to_rounding(quantized, tmp_path):
    model, item = quantized[0], quantized[-1]
    export_onnx(model, tmp_path / "model.onnx", (item,), {"x": {0: "batch"}})
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for x in (item, tokens(3, item.shape[1], WIDTH, seed=9)):
        (got,) = session.run(None, {"x": x.numpy()})
        expected = model(x).numpy()
        # a code on a boundary may flip where float products round in another order
        assert np.mean(np.abs(got - expected) > 1e-5) < 0.1 and np.abs(got - expected).max() < 0.5
    with pytest.raises(ValueError, match=r"`dynamic` names inputs that are none: \['y'\]; inputs: \['x'\]"):
        export_onnx(model, tmp_path / "model.onnx", (item,), {"y": {0: "batch"}})


class Causal(Block):
    """Compares a size, as transformers' attention does; ``pair`` are sizes too."""

    def forward(self, x, pair=None):
        if x.shape[1] > 1 and pair == (2, 6):
            x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Pairs(Net):
    def forward(self, x):
        for block in self.blocks:
            x = block(x, (x.shape[0], x.shape[1]))
        return x


@torch.no_grad()
def test_units_that_compare_sizes_go_to_onnx(tmp_path):
    """Sizes are tensors while ONNX's tracer runs; what units compare them with is plain."""
    torch.manual_seed(0)
    net, item = Pairs(Causal()).eval(), tokens(2, 6, WIDTH)
    model, _ = quantize(net, [(item,)], "rtn", 8, 8, progress=False)
    export_onnx(model, tmp_path / "model.onnx", (item,))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": item.numpy()})
    expected = model(item).numpy()
    assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)
