# SPDX-License-Identifier: Apache-2.0
import copy
import json

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.structures import InstanceData

from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.coco_ap import ExactCocoMetric


@pytest.fixture
def truth(scenes):
    """(annotation file, image id -> annotations)"""
    path = scenes / "instances.json"
    content = json.loads(path.read_text())
    by_image = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        by_image[row["image_id"]].append(row)
    return str(path), by_image


def samples(by_image, shift=0, scores=None):
    generator = torch.Generator().manual_seed(0)
    for img_id, rows in by_image.items():
        rles = [masks.from_annotation(row["segmentation"], (64, 64)) for row in rows]
        moved = torch.from_numpy(masks.decode(rles, (64, 64))).roll(shift, 2)
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = InstanceData(
            bboxes=boxes + shift,
            scores=torch.rand(len(rows), generator=generator),
            labels=torch.zeros(len(rows), dtype=torch.long),
            masks=masks.encode(moved),
        )
        yield dict(img_id=img_id, ori_shape=(64, 64), pred_instances=found)


def measure(cls, ann_file, found, metric):
    judge = cls(ann_file=ann_file, metric=metric)
    judge.dataset_meta = dict(classes=("object",))
    judge.process({}, copy.deepcopy(list(found)))
    return judge.compute_metrics(judge.results)


@pytest.mark.parametrize("metric", ["segm", "bbox"])
def test_figures_are_those_of_mmdet_before_it_rounds(truth, metric):
    ann_file, by_image = truth
    found = list(samples(by_image, shift=3))
    exact = measure(ExactCocoMetric, ann_file, found, metric)
    rounded = measure(CocoMetric, ann_file, found, metric)
    assert 0 < exact["AP"] < 1 and exact["AP"] != round(exact["AP"], 3)
    for ours, theirs in (("AP", "mAP"), ("AP50", "mAP_50"), ("AP75", "mAP_75"), ("AP_small", "mAP_s")):
        assert exact[ours] == pytest.approx(rounded[f"{metric}_{theirs}"], abs=5.1e-4)


def test_the_truth_itself_has_ap_1_and_nothing_found_has_0(truth):
    ann_file, by_image = truth
    assert measure(ExactCocoMetric, ann_file, samples(by_image), "segm")["AP"] == pytest.approx(1)
    empty = list(samples({img_id: [] for img_id in by_image}))
    assert measure(ExactCocoMetric, ann_file, empty, "segm") == {"AP": 0.0, "AP50": 0.0}


def test_only_processed_images_count(truth):
    ann_file, by_image = truth
    (first, *_) = samples(by_image)
    assert measure(ExactCocoMetric, ann_file, [first], "segm")["AP"] == pytest.approx(1)
    assert measure(CocoMetric, ann_file, [first], "segm")["segm_mAP"] < 0.9


def test_it_prints_nothing(truth, capsys):
    measure(ExactCocoMetric, truth[0], samples(truth[1]), "segm")
    assert capsys.readouterr().out == ""
