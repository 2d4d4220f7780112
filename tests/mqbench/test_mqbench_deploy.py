# SPDX-License-Identifier: Apache-2.0
"""``convert_deploy`` to ONNX: exact where the family can be expressed, one clear error where not."""

import numpy as np
import pytest
import torch

pytest.importorskip("mqbench.convert_deploy", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

import onnx
import onnxruntime
from mqbench.convert_deploy import convert_deploy
from mqbench.prepare_by_platform import BackendType, prepare_by_platform
from mqbench.utils.state import enable_calibration, enable_quantization
from torch import nn

from ahcq_plugin.graph import BlockTracer
from ahcq_plugin.mqbench import AHCQ_BACKEND, calibrate
from ahcq_plugin.mqbench.quantizers import FAMILIES, AdaRoundFakeQuantize
from ahcq_plugin.ptq import freeze, quantizers
from tests.mqbench.models import PATCH, TOKENS, ViT, build, by_name, patches

SHAPE = {"x": [2, TOKENS, PATCH]}


def session(path):
    """Without onnxruntime's fusions, which sum in another order: at few bits, last bits become whole steps."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def prepared(**recipe):
    config = {"extra_quantizer_dict": {"recipe": {"name": "ahcq", **recipe}, "prequant": []}}
    model = prepare_by_platform(build(ViT), AHCQ_BACKEND, config, custom_tracer=BlockTracer()).eval()
    calibrate(model, patches(), progress=False)
    enable_quantization(model)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_and_cag_compute_the_same_in_onnx(bits, tmp_path):
    model = freeze(prepared(hluq=False, lnq=False, w_bits=bits, a_bits=bits))
    convert_deploy(model, AHCQ_BACKEND, SHAPE, output_path=str(tmp_path), model_name="vit")
    (out,) = session(tmp_path / "vit.onnx").run(None, {"x": patches()[0].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(out, model(patches()[0]).numpy(), rtol=0, atol=1e-5)
    nodes = [node.op_type for node in onnx.load(tmp_path / "vit.onnx").graph.node]
    plain = [q for _, q in quantizers(model) if q.family != "cag"]
    assert nodes.count("QuantizeLinear") == nodes.count("DequantizeLinear") == len(plain), "codes stay visible"


def test_also_by_name_with_mqbenchs_own_deploy_function(tmp_path):
    model = prepare_by_platform(build(ViT), BackendType.Academic, {"extra_qconfig_dict": by_name("CAG")}).eval()
    enable_calibration(model)
    with torch.no_grad():
        model(patches()[0])
    enable_quantization(model)
    convert_deploy(model, BackendType.Academic, SHAPE, output_path=str(tmp_path), model_name="vit")
    (out,) = session(tmp_path / "vit.onnx").run(None, {"x": patches()[0].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(out, model(patches()[0]).numpy(), rtol=0, atol=1e-5)


class Alone(nn.Module):
    """One quantizer and one weight."""

    def __init__(self, family, bits):
        super().__init__()
        self.act, self.weight_quantizer = FAMILIES[family](quant_max=2**bits - 1), AdaRoundFakeQuantize(quant_max=15)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.act(x), self.weight_quantizer(self.weight)


@pytest.mark.parametrize("family", ["uniform", "cag"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_quantizer_is_equal_bit_for_bit(family, bits, tmp_path):
    model = Alone(family, bits).eval()
    enable_calibration(model)
    model(torch.randn(4, 8, 8) - 0.3)
    enable_quantization(model)
    x = torch.randn(4, 8, 8) * 3  # far outside the range: saturates at both ends
    ties = (torch.arange(64).view(8, 8) % 2**bits - model.act.zero_point[0] + 0.5) * model.act.scale.detach()[0]
    x[0] = ties
    torch.onnx.export(model, (x,), tmp_path / "one.onnx", opset_version=13, input_names=["x"])
    out, weight = session(tmp_path / "one.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected, expected_weight = model(x)
    assert np.array_equal(out, expected.numpy()) and np.array_equal(weight, expected_weight.numpy())


def test_other_families_are_refused_by_name_before_anything_is_written(tmp_path):
    message = r"cannot express 4 quantizers: .*softmax_post_act_fake_quantizer \(family lnq\).*\(family hluq\)"
    with pytest.raises(ValueError, match=message):
        convert_deploy(prepared(), AHCQ_BACKEND, SHAPE, output_path=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    model = prepare_by_platform(build(ViT), BackendType.Academic, {"extra_qconfig_dict": by_name("HLUQ")}).eval()
    enable_calibration(model)
    with torch.no_grad():
        model(patches()[0])
    enable_quantization(model)
    with pytest.raises(ValueError, match=r"cannot express a quantizer \(family hluq\)"):
        convert_deploy(model, BackendType.Academic, SHAPE, output_path=str(tmp_path))


def test_a_weight_that_is_still_being_learned_is_refused(tmp_path):
    model = prepared(hluq=False, lnq=False)
    layer = model.get_submodule("blocks.0.fc1")
    layer.weight_fake_quant.init(layer.weight)
    with pytest.raises(ValueError, match=r"blocks.0.fc1.weight_fake_quant \(rounding still being learned\)"):
        convert_deploy(model, AHCQ_BACKEND, SHAPE, output_path=str(tmp_path))
