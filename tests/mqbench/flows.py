# SPDX-License-Identifier: Apache-2.0
"""Flows as in MQBench's own tests, on torchvision models with random weights; prints a digest of every result.

Run in a process of its own: ``python flows.py plain`` or ``python flows.py plugin``. Equal digests mean that the plugin
changes nothing for those who do not use it.
"""

import argparse
import hashlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision

DEPLOYED = ("Academic", "OPENVINO", "ONNX_QNN")  # the other converters of MQBench do not run with numpy 2
BACKENDS = ("Academic", "Tensorrt", "SNPE", "PPLW8A16", "OPENVINO", "ONNX_QNN", "PPLCUDA", "Tengine_u8", "STPU")
SIZE = 32


def scheme(bit, **kwargs):
    return dict(bit=bit, symmetry=True, per_channel=False, pot_scale=False, **kwargs)


ACADEMIC = {
    "w_observer": "MinMaxObserver",
    "a_observer": "EMAMinMaxObserver",
    "w_fakequantize": "FixedFakeQuantize",
    "a_fakequantize": "LearnableFakeQuantize",
    "w_qscheme": scheme(4),
    "a_qscheme": scheme(4),
}
RECONSTRUCTED = ACADEMIC | {"w_fakequantize": "AdaRoundFakeQuantize", "a_fakequantize": "QDropFakeQuantize"}


def digest(*trees):
    """SHA-256 over tensors, arrays and bytes, in order."""
    total = hashlib.sha256()
    for tree in trees:
        values = tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else [tree])
        for key, value in values:
            total.update(str(key).encode())
            if isinstance(value, torch.Tensor):
                value = value.detach().contiguous().numpy().tobytes()
            total.update(value)
    return total.hexdigest()


def calibrated(name, backend, extra):
    from mqbench.prepare_by_platform import BackendType, prepare_by_platform
    from mqbench.utils.state import enable_calibration, enable_quantization

    torch.manual_seed(0)
    np.random.seed(0)
    model = torchvision.models.get_model(name, weights=None)
    data = [torch.randn(2, 3, SIZE, SIZE) for _ in range(2)]
    config = {"extra_qconfig_dict": extra} if extra else {}
    model = prepare_by_platform(model.eval() if extra is RECONSTRUCTED else model.train(), BackendType[backend], config)
    enable_calibration(model)
    with torch.no_grad():
        for x in data:
            model(x)
    enable_quantization(model)
    return model, data


def train_and_deploy(name, backend):
    from mqbench.convert_deploy import convert_deploy
    from mqbench.prepare_by_platform import BackendType

    model, data = calibrated(name, backend, ACADEMIC if backend == "Academic" else None)
    out = model(data[0])
    out.sum().backward()
    results = [out, model.state_dict(), [p.grad for p in model.parameters() if p.grad is not None]]
    if backend in DEPLOYED:
        with tempfile.TemporaryDirectory() as folder:
            convert_deploy(model.eval(), BackendType[backend], {"x": [1, 3, SIZE, SIZE]}, None, folder, "model")
            results.append({path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())})
            assert results[-1]
    return digest(*results)


def reconstruct(name):
    from mqbench.advanced_ptq import ptq_reconstruction

    model, data = calibrated(name, "Academic", RECONSTRUCTED)
    settings = dict(pattern="block", scale_lr=4e-5, warm_up=0.2, weight=0.01, max_count=3, b_range=[20, 2], prob=0.5)
    config = argparse.Namespace(keep_gpu=True, round_mode="learned_hard_sigmoid", **settings)
    done = ptq_reconstruction(model.eval(), data, config)
    return digest(done.state_dict(), done(data[0]))


if __name__ == "__main__":
    if sys.argv[1] == "plugin":
        import ahcq_plugin.mqbench

        ahcq_plugin.mqbench.register()
    import mqbench.prepare_by_platform  # noqa: F401

    logging.getLogger("MQBENCH").setLevel(logging.ERROR)
    digests = {backend: train_and_deploy("resnet18", backend) for backend in BACKENDS}
    digests["mobilenet_v2"] = train_and_deploy("mobilenet_v2", "Tensorrt")
    digests["reconstruction"] = reconstruct("resnet18")
    digests["plugin loaded"] = "ahcq_plugin" in sys.modules
    sys.stdout.write("\n" + json.dumps(digests))
