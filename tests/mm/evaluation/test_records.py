# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from ahcq_plugin.mm import BoxPromptedSAM
from ahcq_plugin.mm.data.wrappers import innermost, wrapped
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation import image_evaluation, masks
from ahcq_plugin.mm.evaluation.image_evaluation import evaluate
from ahcq_plugin.mm.evaluation.records import (
    CalibrationBatches,
    calibration_dataset,
    calibration_records,
    read_records,
)
from ahcq_plugin.support.cache import Cache

DETECTOR = dict(type="FixedDetector", boxes=[[3.0, 4.0, 30.0, 41.0], [10.5, 0.0, 52.0, 20.0]], scores=[0.9, 0.5])


@pytest.fixture
def loader(scenes_config):
    return Runner.build_dataloader(
        dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=scenes_config)
    )


@pytest.fixture
def detecting(tiny_sam):
    return BoxPromptedSAM(tiny_sam, DETECTOR).eval()


def annotations(scenes):
    return json.loads((scenes / "instances.json").read_text())["annotations"]


def test_records_hold_the_annotations_of_the_file(loader, tiny_sam, scenes):
    records = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))
    assert [record.img_id for record in records] == [1, 2, 3]
    for record in records:
        rows = [row for row in annotations(scenes) if row["image_id"] == record.img_id]
        boxes = np.array([row["bbox"] for row in rows], dtype=float)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(record.truth.boxes, boxes)
        areas = masks.decode(record.truth_masks(), record.size).sum((1, 2))
        assert areas.tolist() == [row["area"] for row in rows]
        assert record.prompts is record.truth and record.read().shape == (64, 64, 3)


def test_the_detector_runs_once_per_image_and_never_again_with_a_cache(loader, detecting, tmp_path):
    first = read_records(loader, detecting, Cache(tmp_path))
    assert detecting.detector.images == 3
    again = read_records(loader, detecting, Cache(tmp_path))
    assert detecting.detector.images == 3
    assert all(torch.equal(a.detected.boxes, b.detected.boxes) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        detecting.detector.weight += 1
    read_records(loader, detecting, Cache(tmp_path))
    assert detecting.detector.images == 6, "other weights, other detections"


def test_changed_pixels_or_annotations_change_the_identity(loader, tiny_sam, scenes):
    def identities():
        return [repr(r.identity()) for r in read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))]

    before = identities()
    assert identities() == before
    path = scenes / "images" / "000001.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert [a == b for a, b in zip(before, identities(), strict=True)] == [True, False, True]


def test_calibration_images_follow_the_seed(scenes_config, tiny_sam):
    dataset, model = calibration_dataset(scenes_config, scenes_config["pipeline"]), BoxPromptedSAM(tiny_sam)
    orders = {seed: [r.img_id for r in calibration_records(dataset, model, 3, seed)] for seed in range(6)}
    assert all(sorted(order) == [1, 2, 3] for order in orders.values()) and len(set(map(tuple, orders.values()))) > 1
    assert orders[0] == [r.img_id for r in calibration_records(dataset, model, 3, 0)]


def test_an_image_that_vanishes_is_named_before_the_detector_runs(scenes, scenes_config, detecting):
    path = scenes / "instances.json"
    content = json.loads(path.read_text())
    for row in content["images"]:
        row.update(height=1, width=20_000)
    path.write_text(json.dumps(content))
    dataset = calibration_dataset(scenes_config, scenes_config["pipeline"])
    with pytest.raises(DataError, match=r"images/\w+.png has \(1, 20000\) pixels \(H, W\): no row or column is left"):
        calibration_records(dataset, detecting, 1, 0)
    loader = SimpleNamespace(dataset=dataset)
    with pytest.raises(DataError, match="no row or column is left"):
        read_records(loader, detecting, Cache(None))
    assert detecting.detector.images == 0


def test_more_images_than_there_are_are_refused_before_the_detector_runs(scenes_config, detecting):
    dataset = calibration_dataset(scenes_config, scenes_config["pipeline"])
    with pytest.raises(ValueError, match="`tune_images` is 4, but there are only 3 calibration images"):
        calibration_records(dataset, detecting, 4, 0, "tune_images")
    assert detecting.detector.images == 0


def test_images_without_boxes_do_not_calibrate(scenes, scenes_config, tiny_sam):
    path = scenes / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 2]
    path.write_text(json.dumps(content))
    dataset, model = calibration_dataset(scenes_config, scenes_config["pipeline"]), BoxPromptedSAM(tiny_sam)
    assert sorted(r.img_id for r in calibration_records(dataset, model, 2, 0)) == [1, 3]
    with pytest.raises(ValueError, match="`num_images` is 3, but only 2 of 3 calibration images have a box"):
        calibration_records(dataset, model, 3, 0)
    path.write_text(json.dumps(content | {"annotations": []}))
    dataset = calibration_dataset(scenes_config, scenes_config["pipeline"])
    with pytest.raises(ValueError, match="none of 3 calibration images has a box: are the classes of the config"):
        calibration_records(dataset, model, 3, 0)


def test_wrappers_that_mix_or_repeat_are_taken_off(scenes_config):
    mixed = dict(type="MultiImageMixDataset", dataset=scenes_config | dict(pipeline=[]), pipeline=[dict(type="Mosaic")])
    for config in (mixed, dict(type="RepeatDataset", times=5, dataset=mixed)):
        dataset = calibration_dataset(config, scenes_config["pipeline"])
        assert len(dataset) == 3 and dataset[0]["inputs"].shape == (3, 64, 64)
    both = calibration_dataset(dict(type="ConcatDataset", datasets=[mixed, scenes_config]), scenes_config["pipeline"])
    assert len(both) == 6 and innermost(both).cat_ids == [1]


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_wrappers_are_taken_off_configs_and_built_data_sets(kind):
    one, other = kind(ann_file="a.json"), kind(ann_file="b.json")
    both = kind(datasets=[kind(dataset=one), other])
    assert wrapped(both)[1] is other and wrapped(other) == []
    assert innermost(kind(dataset=both)) is one


def test_batches_are_the_same_whenever_asked_for(scenes_config, tiny_sam):
    dataset, model = calibration_dataset(scenes_config, scenes_config["pipeline"]), BoxPromptedSAM(tiny_sam)
    batches = CalibrationBatches(model, calibration_records(dataset, model, 3, 0), max_boxes=2, seed=0)
    assert len(batches) == 3
    for one, other in zip(batches, batches, strict=True):
        assert len(one["boxes"]) <= 2 and all(torch.equal(one[key], other[key]) for key in one)


def test_images_without_a_file_come_through_the_pipeline(scenes_config, tiny_sam, monkeypatch):
    keys = ("img_id", "ori_shape", "img_shape", "ori_img")
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="KeepOriginalImage"),
        dict(type="Resize", scale=(32, 32)),
        dict(type="PackDetInputs", meta_keys=keys),
    ]
    loader = Runner.build_dataloader(
        dict(
            batch_size=1,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=scenes_config | dict(pipeline=pipeline),
        )
    )
    model = BoxPromptedSAM(tiny_sam)
    from_files = read_records(loader, model, Cache(None))
    of_file = type(loader.dataset).get_data_info

    class Blind(type(loader.dataset)):
        """Hides paths from everything but the pipeline."""

        def get_data_info(self, index):
            return of_file(self, index) | ({} if self.loading else {"img_path": None})

        def prepare_data(self, index):
            self.loading = True
            try:
                return super().prepare_data(index)
            finally:
                self.loading = False

    loader.dataset.__class__, loader.dataset.loading = Blind, False
    in_memory = read_records(loader, model, Cache(None))
    assert all(record.img_path is None for record in in_memory)
    for one, other in zip(from_files, in_memory, strict=True):
        np.testing.assert_array_equal(one.read(), other.read())


class Oracle(BoxPromptedSAM):
    """Answers a box with its ground-truth mask, moved by ``shift`` pixels; any other box with nothing."""

    def __init__(self, sam, records, shift=0, **kwargs):
        super().__init__(sam, **kwargs)
        self.known, self.shift, self.encoded = {}, shift, 0
        for record in records:
            truth = torch.from_numpy(masks.decode(record.truth_masks(), record.size)).roll(shift, 2)
            self.known |= {tuple(box): mask for box, mask in zip(record.truth.boxes.tolist(), truth, strict=True)}

    def encode(self, image):
        self.encoded += 1

    def decode(self, embedding, boxes):
        for box in boxes.tolist():
            yield self.known.get(tuple(box), torch.zeros(64, 64).bool())[None], torch.ones(1)


def test_the_truth_scores_1_and_agrees_with_itself(loader, tiny_sam):
    records = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))
    meta = loader.dataset.metainfo
    exact = evaluate(Oracle(tiny_sam, records), records, meta, loader.dataset.ann_file)
    assert exact.metrics["AP"] == pytest.approx(1) and exact.metrics["mIoU"] == 1 and "IoU_fp" not in exact.metrics
    moved = evaluate(Oracle(tiny_sam, records, shift=2), records, meta, loader.dataset.ann_file, reference=exact)
    assert moved.metrics["IoU_fp"] == moved.metrics["mIoU"] < 1
    assert moved.metrics["IoU_fp_low"] <= moved.metrics["IoU_fp"] <= moved.metrics["IoU_fp_high"] < 1
    again = evaluate(Oracle(tiny_sam, records, shift=2), records, meta, loader.dataset.ann_file, reference=moved)
    assert again.metrics["IoU_fp"] == 1 and again.metrics["mIoU"] == moved.metrics["mIoU"]


def test_agreement_by_size_is_that_of_the_masks_of_this_size(loader, tiny_sam, monkeypatch):
    """Their means, weighted by how many there are, are the mean of all; by areas counted pixel by pixel."""
    records = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))
    meta, file = loader.dataset.metainfo, loader.dataset.ann_file
    wanted = [mask for record in records for mask in masks.decode(record.truth_masks(), record.size)]
    pixels = sorted(int(mask.sum()) for mask in wanted)
    limit = pixels[len(pixels) // 2]
    monkeypatch.setattr(image_evaluation, "SIZES", {"small": (0, limit), "large": (limit, float("inf"))})
    exact = evaluate(Oracle(tiny_sam, records), records, meta, file)
    moved = evaluate(Oracle(tiny_sam, records, shift=2), records, meta, file, reference=exact).metrics
    ious = {"small": [], "large": []}
    for mask in wanted:
        other = np.roll(mask, 2, 1)
        ious["small" if mask.sum() < limit else "large"].append((mask & other).sum() / (mask | other).sum())
    assert all(ious.values())
    for size, values in ious.items():
        assert moved[f"IoU_fp_{size}"] == pytest.approx(np.mean(values))
    assert moved["IoU_fp_small"] < moved["IoU_fp_large"], "two pixels are more of a small mask"


def test_both_sets_of_prompts_share_the_embedding(loader, tiny_sam, detecting):
    records = read_records(loader, detecting, Cache(None))
    oracle = Oracle(tiny_sam, records)
    found = evaluate(oracle, records, loader.dataset.metainfo, loader.dataset.ann_file).metrics
    assert oracle.encoded == 3
    assert found["AP"] == 0 and found["AP_gt"] == pytest.approx(1), "the oracle knows true boxes only"


def test_without_an_annotation_file_the_records_own_annotations_judge(loader, tiny_sam):
    records = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))
    found = evaluate(Oracle(tiny_sam, records), records, loader.dataset.metainfo, None).metrics
    assert found["AP"] == pytest.approx(1)


def test_a_data_set_without_objects_or_masks_is_refused(loader, tiny_sam):
    records = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))
    model, meta = Oracle(tiny_sam, records), loader.dataset.metainfo
    bare = [{k: v for k, v in i.items() if k != "mask"} for i in records[0].instances]
    with pytest.raises(ValueError, match="image 1 has an annotation without a mask"):
        evaluate(model, [dataclasses.replace(records[0], instances=bare)], meta, None)
    empty = dataclasses.replace(records[0], instances=[], truth=records[0].truth.top(2.0, 1))
    with pytest.raises(ValueError, match="no image of the data set has a ground-truth object"):
        evaluate(model, [empty], meta, loader.dataset.ann_file)


def test_an_image_of_another_size_than_annotated_is_named(loader, tiny_sam):
    record = read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))[0]
    with pytest.raises(ValueError, match=r"000000.png has \(64, 64\) pixels \(H, W\), its annotation says \(64, 65\)"):
        dataclasses.replace(record, size=(64, 65)).read()
