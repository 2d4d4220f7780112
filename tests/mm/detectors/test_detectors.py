# SPDX-License-Identifier: Apache-2.0
"""Boxes of detectors inside BoxPromptedSAM against MMDetection's own inference API."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ahcq_plugin.mm import BoxPromptedSAM
from ahcq_plugin.mm.dry_run import initialise
from ahcq_plugin.mm.evaluation.records import read_records
from ahcq_plugin.support.cache import Cache

DETECTORS = Path(__file__).resolve().parents[3] / "mm_configs" / "_base_" / "detectors"
BASES = ["faster_rcnn_r50", "yolox_l", "dino_r50"]
SIZE = 256
LIMIT = 40


@pytest.fixture
def folder(tmp_path):
    """A wide and a high image, neither of the size that detectors get, in a COCO data set."""
    rng = np.random.default_rng(0)
    rows = []
    for number, (height, width) in enumerate([(90, 133), (150, 75)], 1):
        pixels = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (width, height))
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
        rows.append(dict(id=number, file_name=f"{number}.png", width=width, height=height))
    annotations = [dict(id=i, image_id=i, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0) for i in (1, 2)]
    content = dict(images=rows, annotations=annotations, categories=[dict(id=1, name="person")])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def _config(base, folder):
    """A detector's config with small inputs, on the images of ``folder``, without a score threshold."""
    cfg = Config.fromfile(DETECTORS / f"{base}.py")
    cfg.merge_from_dict({"model.test_cfg.rcnn.score_thr" if "rcnn" in base else "model.test_cfg.score_thr": 0.0})
    if base == "dino_r50":
        cfg.model.num_queries = 100  # 900 are more than small images have points
    dataset = cfg.test_dataloader.dataset
    for step in dataset.pipeline:
        if "scale" in step:
            step.scale = (SIZE, SIZE)
    dataset.update(data_root=str(folder), ann_file="instances.json", data_prefix=dict(img=""))
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    return cfg


def _detector(cfg):
    """With random weights that find boxes which differ from one another."""
    torch.manual_seed(0)
    detector = init_detector(cfg, device="cpu")
    initialise(detector)
    for name, parameter in detector.named_parameters():
        if any(part in name for part in ("fc_reg", "conv_reg", "conv_cls", "conv_obj", "reg_branches", "cls_branches")):
            torch.nn.init.normal_(parameter, std=0.05)
    return detector


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore:checkpoint is None")
def test_boxes_are_those_of_mmdets_inference_api(base, folder, tiny_sam):
    cfg = _config(base, folder)
    detector = _detector(cfg)
    init_default_scope("mmdet")
    loader = Runner.build_dataloader(cfg.test_dataloader)
    model = BoxPromptedSAM(tiny_sam, detector, score_thr=0.0, max_boxes=LIMIT).eval()
    records = read_records(loader, model, Cache(None))
    for index, record in enumerate(records):
        wanted = inference_detector(detector, record.img_path).pred_instances
        order = wanted.scores.argsort(descending=True, stable=True)[:LIMIT]
        assert len(order) == LIMIT and len(wanted.bboxes[order].unique(dim=0)) > LIMIT // 2
        for found, expected in ((record.detected.boxes, wanted.bboxes), (record.detected.scores, wanted.scores)):
            torch.testing.assert_close(found, expected[order], rtol=0, atol=0)
        assert torch.equal(record.detected.labels, wanted.labels[order])
        sample = model.test_step(pseudo_collate([loader.dataset[index]]))[0]
        assert torch.equal(sample.pred_instances.bboxes, record.detected.boxes)
        assert sample.pred_instances.masks.shape == (LIMIT, *record.size)
