# SPDX-License-Identifier: Apache-2.0
"""docs/mmdet.md: its child config makes PTQ runs of unmodified mmdet configs, run by mmdet's own tools/test.py."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config

from ahcq_plugin.mm import quantization_loop
from ahcq_plugin.mm.dry_run import initialise

ROOT = Path(__file__).resolve().parents[2]
MIM = Path(mmdet.__file__).parent / ".mim"
# Of the paper's detectors and two that the package has no config for.
PARENTS = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ["model.test_cfg.rcnn.score_thr=0"],
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": ["model.test_cfg.score_thr=0"],
    "detr/detr_r50_8xb2-150e_coco.py": [],
}


def documented_child():
    (block,) = re.findall(r"```python\n(_base_ = .*?)```", (ROOT / "docs" / "mmdet.md").read_text(), re.DOTALL)
    return block


@pytest.fixture
def coco(scenes):
    """``scenes`` in COCO's folders with COCO's 80 categories."""
    content = json.loads((scenes / "instances.json").read_text())
    content["categories"] = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
    (scenes / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (scenes / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        shutil.copytree(scenes / "images", scenes / part)
    return scenes


def test_the_child_is_of_ten_lines():
    assert len(documented_child().splitlines()) <= 10


@pytest.mark.parametrize("parent", [pytest.param(p, marks=() if "faster" in p else pytest.mark.slow) for p in PARENTS])
def test_mmdets_tool_runs_a_child_of_an_unmodified_config(parent, coco, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization_loop, "write_report", lambda path, data: Path(path).write_text("<html>"))
    child = re.sub('mmdet::[^"]+', f"mmdet::{parent}", documented_child(), count=1)
    (tmp_path / "child.py").write_text(child)
    torch.manual_seed(0)
    detector = MODELS.build(Config.fromfile(MIM / "configs" / parent).model)
    initialise(detector)
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "random.pth")
    options = [f"{part}_dataloader.dataset.data_root={coco}" for part in ("train", "test")]
    options += ["test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False"]
    options += [f"test_dataloader.dataset.pipeline.{i}.scale=(96,96)" for i in _resizing(parent)]
    options += ["sam.name=sam_tiny", "sam.checkpoint=None", "recipe.name=rtn"]
    options += ["test_cfg.calib.num_images=2", "test_cfg.score_thr=0", "test_cfg.max_boxes=3", *PARENTS[parent]]
    arguments = ["test.py", "child.py", "random.pth", "--work-dir", "out", "--cfg-options", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    runpy.run_path(str(MIM / "tools" / "test.py"), run_name="__main__")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["audit"]["passed"] and metrics["bits"] == [4, 4]
    assert 0 < metrics["quantized"]["IoU_fp"] < 1
    assert {"AP", "AP_gt", "AP_box", "mIoU"} <= metrics["fp"].keys(), "boxes came from the detector"
    assert (tmp_path / "out" / "quantized.pth").is_file()


def _resizing(parent):
    pipeline = Config.fromfile(MIM / "configs" / parent).test_dataloader.dataset.pipeline
    return [index for index, step in enumerate(pipeline) if "scale" in step]
