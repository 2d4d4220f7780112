# SPDX-License-Identifier: Apache-2.0
"""The code of docs/mqbench.md runs, on small models with few iterations."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mqbench.convert_deploy", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from ahcq_plugin.ptq import quantizers
from ahcq_plugin.zoo import sam as zoo
from tests.mqbench.models import MLP, build, patches

DOCS = Path(__file__).resolve().parents[2] / "docs" / "mqbench.md"
SMALLER = {
    "pretrained=True": "pretrained=False, img_size=32, depth=1",
    "torch.randn(4, 3, 224, 224) for _ in range(8)": "torch.randn(2, 3, 32, 32) for _ in range(2)",
    "torch.randn(1, 3, 1024, 1024) for _ in range(8)": "torch.randn(1, 3, 64, 64) for _ in range(2)",
    '"iterations": 2000': '"iterations": 2',
    "max_count=20000": "max_count=2",
}


def test_the_examples_run(tiny_sam, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "build_sam", lambda name: tiny_sam)
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL))
    for original, smaller in SMALLER.items():
        assert original in code, original
        code = code.replace(original, smaller)
    names = {"mlp": build(MLP), "calibration_data": patches(2), "print": lambda *line: None}
    torch.manual_seed(0)
    exec(compile(code, str(DOCS), "exec"), names)
    assert (tmp_path / "vit.onnx").is_file()
    assert names["reconstructed"](patches()[0]).shape == patches()[0].shape
    assert {q.family for _, q in quantizers(names["sam"])} == {"adaround", "cag", "hluq", "lnq", "uniform"}
    assert all(not name.startswith("mask_decoder") for name, _ in quantizers(names["sam"]))
