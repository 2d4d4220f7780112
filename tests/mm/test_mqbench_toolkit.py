# SPDX-License-Identifier: Apache-2.0
"""``toolkit='mqbench'`` in a whole run: the table, the parameters and the figures of ``toolkit='native'``."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("mqbench.prepare_by_platform", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from mqbench import prepare_by_platform as host

from ahcq_plugin.mm import quantization_loop
from ahcq_plugin.mm.launch import launch

SAM_TINY = {"sam.name": "sam_tiny", "sam.checkpoint": None, "recipe.name": "ahcq", "recipe.iterations": 1}
FEW = {"test_cfg.calib.num_images": 1}


def test_both_toolkits_give_the_same_figures_and_tensors_on_sam_tiny(ptq_config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        quantization_loop, "write_report", lambda path, data: Path(path).write_text(json.dumps(data.roles))
    )
    original = host.prepare_by_platform
    monkeypatch.setattr(host, "prepare_by_platform", lambda *a, **k: calls.append(a[1]) or original(*a, **k))
    metrics, states, tables = {}, {}, {}
    for toolkit in ("native", "mqbench"):
        folder = tmp_path / toolkit
        options = dict(work_dir=str(folder), cfg_options=SAM_TINY | FEW, toolkit=toolkit)
        assert launch(str(ptq_config), console=Console(file=io.StringIO()), **options) == 0
        metrics[toolkit] = json.loads((folder / "metrics.json").read_text())
        states[toolkit] = torch.load(folder / "quantized.pth", weights_only=True)["state_dict"]
        tables[toolkit] = json.loads((folder / "report.html").read_text())
        assert bool(calls) == (toolkit == "mqbench")
    assert set(calls) == {"AHCQ"}
    assert tables["mqbench"] == tables["native"] and len(tables["native"]) > 100
    for part in ("fp", "quantized", "audit", "recipe", "bits"):
        assert metrics["mqbench"][part] == metrics["native"][part], part
    assert 0 < metrics["native"]["quantized"]["AP"] < 1
    assert states["native"].keys() == states["mqbench"].keys()
    assert [k for k, value in states["native"].items() if not torch.equal(value, states["mqbench"][k])] == []
