# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint measured by a config: fake-quantized with the run's own figures, and on integers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ahcq_plugin import load_quantized
from ahcq_plugin.integer import to_integer
from ahcq_plugin.mm import evaluate_checkpoint as evaluating
from ahcq_plugin.mm import quantization_loop
from ahcq_plugin.mm.evaluate_checkpoint import evaluate_checkpoint
from ahcq_plugin.mm.launch import launch
from ahcq_plugin.ptq import AuditError, save_checkpoint
from ahcq_plugin.ptq.prepare import recipe_in
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers import FakeQuantize


def test_it_gives_the_figures_of_the_run(ptq_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantization_loop, "write_report", lambda path, data: Path(path).write_text("<html>"))
    console = Console(file=io.StringIO())
    assert launch(str(ptq_config), work_dir=str(tmp_path / "out"), console=console) == 0
    wanted = json.loads((tmp_path / "out" / "metrics.json").read_text())["quantized"]
    checkpoint = tmp_path / "out" / "quantized.pth"
    fake = evaluate_checkpoint(str(ptq_config), checkpoint, console=console)
    assert fake == {name: value for name, value in wanted.items() if not name.startswith("IoU_")}
    measured = []
    original = FakeQuantize.forward
    monkeypatch.setattr(FakeQuantize, "forward", lambda self, x: measured.append(self) or original(self, x))
    # the audit before it runs them
    monkeypatch.setattr(evaluating, "to_integer", lambda sam: measured.clear() or to_integer(sam))
    integer = evaluate_checkpoint(str(ptq_config), checkpoint, integer=True, console=console)
    assert not measured, "the integer model ran fake quantizers"
    assert integer.keys() == fake.keys() and integer["mIoU"] == pytest.approx(fake["mIoU"], abs=0.005)
    for kind in ("fake", "integer"):
        written = json.loads((tmp_path / "out" / f"evaluation_{kind}.json").read_text())
        assert written["integer"] == (kind == "integer") and written["mIoU"] > 0
    model = load_quantized(tmp_path / "out" / "quantized.safetensors")  # which says how it is built
    layer = next(iter(weight_layers(model).values()))
    layer.weight.data.view(-1)[0] += 0.3 * layer.weight_fake_quant.scale.min()
    save_checkpoint(tmp_path / "other.pth", model, recipe_in(model))
    with pytest.raises(AuditError, match="1 of .* weights are off their grid"):
        evaluate_checkpoint(str(ptq_config), tmp_path / "other.pth", console=console)


def test_a_checkpoint_that_is_none_is_refused(ptq_config, tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        evaluate_checkpoint(str(ptq_config), tmp_path / "nothing.pth", console=Console(file=io.StringIO()))
