# SPDX-License-Identifier: Apache-2.0
import importlib.util
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ahcq_plugin import quantize
from ahcq_plugin.mm.report import compare as module
from ahcq_plugin.mm.report.compare import compare, draw, read_boxes
from ahcq_plugin.ptq import Recipe, calibrate, freeze, prepare, save_checkpoint
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.conftest import TINY_SAM, make_tiny_sam

ROOT = Path(__file__).resolve().parents[3]
BITS = (8, 3)


@pytest.fixture
def runs(tmp_path, tiny_items, monkeypatch):
    """Checkpoints of the tiny SAM at 8 and 3 bits, rounded to nearest, and its floating-point weights."""
    monkeypatch.setattr(module, "name_of_state", lambda state: "tiny")
    monkeypatch.setattr(
        module,
        "build_sam",
        lambda name, checkpoint: build_sam(TINY_SAM, tmp_path / "fp.pth" if checkpoint is None else checkpoint),
    )
    torch.save(make_tiny_sam().state_dict(), tmp_path / "fp.pth")
    for bits in BITS:
        sam, recipe = make_tiny_sam(), Recipe.from_config("rtn", w_bits=bits, a_bits=bits)
        prepare(sam, recipe)
        calibrate(sam, tiny_items, box_forward, progress=False)
        freeze(sam)
        save_checkpoint(tmp_path / f"{bits}.pth", sam, recipe)
    return [tmp_path / f"{bits}.pth" for bits in BITS]


def test_panels_and_picture(runs, scenes, tmp_path):
    image = scenes / "images" / "000000.png"
    boxes = read_boxes(scenes / "instances.json", image)
    panels = compare(image, boxes, [*runs, *runs, *runs])
    assert [panel.title for panel in panels] == ["image", "FP", *["rtn W8A8", "rtn W3A3"] * 3]
    fp, eight, three = panels[1:4]
    assert fp.iou is None and 0.9 < eight.iou <= 1 and three.iou < eight.iou
    assert panels[4].iou == eight.iou
    assert not np.array_equal(fp.image, three.image), "other masks, another picture"
    draw(panels, tmp_path / "one.png")
    draw(panels[:3], tmp_path / "two.png")
    one, two = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("one", "two"))
    assert one.shape[1] == 1800 and two.shape[1] == 1350, "four and three panels of 450 pixels"
    assert one.shape[0] == pytest.approx(2 * two.shape[0], abs=2), "two rows and one"


def test_boxes_of_a_file(scenes, tmp_path):
    boxes = read_boxes(scenes / "instances.json", "elsewhere/000001.png")
    assert boxes.shape[1] == 4 and bool((boxes[:, 2:] > boxes[:, :2]).all())
    with pytest.raises(ValueError, match="has no box for an image x.png"):
        read_boxes(scenes / "instances.json", "x.png")
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_boxes(tmp_path / "x.json", "x.png")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not in COCO format"):
        read_boxes(tmp_path / "x.json", "x.png")


def test_the_tool_prints_overlaps_and_errors_in_a_line(runs, scenes, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools" / "compare.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        return end.value.code, capsys.readouterr()

    image, out = scenes / "images" / "000000.png", tmp_path / "c.png"
    code, text = run(image, *runs, "--box", "5,5,40,40", "--box", "1,2,30,30", "--out", out)
    assert code == 0 and text.out.count("over 2 boxes") == 2 and out.is_file()
    for arguments, message in (
        ((image, runs[0], "--box", "1,2,3"), "--box must be four numbers"),
        ((image, runs[0], "--box", "5,5,1,1"), "the box 5, 5, 1, 1 has no area"),
        ((image, runs[0], "--box=-9,-9,-5,-5"), "has no area in an image of"),
        ((image, runs[0], "--box", "nan,1,9,9"), "the box nan, 1, 9, 9"),
        ((tmp_path / "no.png", runs[0], "--box", "1,2,3,4"), "no image"),
        ((image, tmp_path / "no.pth", "--box", "1,2,3,4"), "checkpoint not found"),
        ((image, tmp_path / "fp.pth", "--box", "1,2,30,40"), "is not a quantized checkpoint"),
    ):
        code, text = run(*arguments, "--out", out)
        assert code == 2 and text.err.startswith("error: ") and message in text.err and text.err.count("\n") == 1


@pytest.mark.slow
def test_the_tool_in_a_process_of_its_own(scenes, tmp_path):
    """As its documentation says, without a Runner that would set a scope: once it ended in a KeyError of a registry."""
    sam, recipe = build_sam("sam_tiny"), Recipe.from_config("rtn", w_bits=8, a_bits=8)
    items = [{"image": torch.zeros(1, 3, 256, 256), "boxes": torch.tensor([[10.0, 10, 200, 200]])}]
    quantize(sam, items, recipe, forward=box_forward, work_dir=tmp_path, progress=False)
    command = ["tools/compare.py", str(scenes / "images" / "000000.png"), str(tmp_path / "quantized.pth")]
    command += ["--annotations", str(scenes / "instances.json"), "--out", str(tmp_path / "compare.png")]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "rtn W8A8: IoU to FP" in run.stdout and (tmp_path / "compare.png").is_file()
