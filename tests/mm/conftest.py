# SPDX-License-Identifier: Apache-2.0
"""Fixtures: generated images on disk, a detector with fixed boxes, a PTQ config of seconds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from rich.console import Console

from ahcq_plugin.mm.launch import launch
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.scenes import write_coco

CONFIGS = Path(__file__).resolve().parents[2] / "mm_configs"
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]


@MODELS.register_module(force=True)
class FixedDetector(BaseDetector):
    """Finds the same boxes on every image and counts its runs."""

    def __init__(self, boxes, scores, labels=None):
        super().__init__()
        self.boxes, self.scores = torch.tensor(boxes).view(-1, 4), torch.tensor(scores)
        self.labels = torch.zeros(len(scores), dtype=torch.long) if labels is None else torch.tensor(labels)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.images = 0

    def predict(self, batch_inputs, batch_data_samples):
        self.images += len(batch_data_samples)
        for sample in batch_data_samples:
            sample.pred_instances = InstanceData(bboxes=self.boxes, scores=self.scores, labels=self.labels)
        return batch_data_samples

    def loss(self, *args):
        raise NotImplementedError

    extract_feat = _forward = loss


@pytest.fixture(autouse=True, scope="session")
def mmdet_modules():
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope="session")
def _scenes(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("scenes") / "three", count=3, seed=3, size=64).parent


@pytest.fixture
def scenes(_scenes, tmp_path) -> Path:
    """Folder of three 64-pixel images with instances.json; a copy, free to damage."""
    return Path(shutil.copytree(_scenes, tmp_path / "scenes"))


@pytest.fixture
def scenes_config(scenes) -> dict:
    """Data set config of ``scenes``."""
    return dict(
        type="CocoDataset",
        data_root=str(scenes),
        ann_file="instances.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("object",)),
        test_mode=True,
        pipeline=PIPELINE,
    )


@pytest.fixture
def sample(scenes) -> DetDataSample:
    """Data sample of the first image of ``scenes`` with its ground truth."""
    info = json.loads((scenes / "instances.json").read_text())
    image = info["images"][0]
    rows = [row for row in info["annotations"] if row["image_id"] == image["id"]]
    instances = [
        dict(bbox=[x, y, x + w, y + h], bbox_label=0, ignore_flag=0) for x, y, w, h in (row["bbox"] for row in rows)
    ]
    path = str(scenes / "images" / image["file_name"])
    metainfo = dict(img_id=image["id"], img_path=path, ori_shape=(64, 64), instances=instances)
    return DetDataSample(metainfo=metainfo)


@pytest.fixture
def coco_val_loader(shared_data, monkeypatch):
    """Test data loader of the YOLOX-nano config on the real validation images."""
    monkeypatch.setenv("AHCQ_DATA", str(shared_data))
    cfg = Config.fromfile(CONFIGS / "sam_tiny_w4a4_yolox_nano_coco.py")
    return Runner.build_dataloader(cfg.test_dataloader)


@pytest.fixture
def tiny_sam_config() -> dict:
    """Constructor arguments of the ``tiny_sam`` fixture."""
    sizes = dict(image_size=64, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, window_size=3, global_attn_indexes=[1])
    decoder = dict(prompt_embed_dim=16, mask_in_chans=4, transformer_heads=2, transformer_mlp_dim=32)
    return packaged_config() | sizes | decoder | dict(iou_head_depth=2, iou_head_hidden_dim=16)


@pytest.fixture
def sam_config(tiny_sam, tiny_sam_config, tmp_path) -> dict:
    """``sam`` of a config: the small SAM with its weights in a file."""
    path = tmp_path / "tiny_sam.pth"
    torch.save(tiny_sam.state_dict(), path)
    return dict(name=tiny_sam_config, checkpoint=str(path))


@pytest.fixture
def ptq_config(sam_config, scenes_config, tmp_path) -> Path:
    """File of a PTQ config that runs in seconds: small SAM, three images, round to nearest."""
    content = dict(
        _base_=str(CONFIGS / "demo_sam_tiny_w4a4.py"),
        sam=dict(_delete_=True, **sam_config),
        recipe=dict(name="rtn", iterations=2),
        test_dataloader=dict(dataset=dict(_delete_=True, **scenes_config)),
        test_cfg=dict(
            cache_dir=None, calib=dict(num_images=2, max_boxes=2, dataset=dict(_delete_=True, **scenes_config))
        ),
    )
    path = tmp_path / "small.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in content.items()))
    return path


@pytest.fixture
def run(ptq_config, tmp_path):
    """Launch the small config; returns (exit code, printed text, metrics or None)."""

    def launch_it(config=ptq_config, **options):
        out, work_dir = io.StringIO(), tmp_path / "out"
        code = launch(str(config), work_dir=str(work_dir), console=Console(file=out, width=120), **options)
        path = work_dir / "metrics.json"
        return code, out.getvalue(), json.loads(path.read_text()) if path.exists() else None

    return launch_it
