# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from segment_anything import SamPredictor

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.mm import BoxPromptedSAM
from ahcq_plugin.mm.evaluation import everything, masks
from ahcq_plugin.mm.evaluation.everything import Everything, EverythingOptions, found_again, segment_everything
from ahcq_plugin.mm.evaluation.image_evaluation import Evaluation, evaluate
from ahcq_plugin.mm.evaluation.prompted import check_kinds, segment_prompted
from ahcq_plugin.mm.evaluation.records import CalibrationBatches, read_records
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.zoo.prompts import draw_clicks, prompt_forward

ALL = ("click1", "click3", "mask")


@pytest.fixture
def records(scenes_config, tiny_sam):
    loader = Runner.build_dataloader(
        dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=scenes_config)
    )
    return read_records(loader, BoxPromptedSAM(tiny_sam), Cache(None))


def square(x: int, y: int, side: int, size: int = 20) -> masks.RLE:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, y : y + side, x : x + side] = True
    return masks.encode(mask)[0]


@pytest.mark.parametrize("kind", ALL)
def test_masks_of_clicks_are_those_of_the_official_predictor(tiny_sam, records, kind, monkeypatch):
    clicks = []

    def spy(*args):
        clicks.append(draw_clicks(*args))
        return clicks[-1]

    monkeypatch.setattr("ahcq_plugin.mm.evaluation.prompted.draw_clicks", spy)
    model, record = BoxPromptedSAM(tiny_sam, box_chunk=1), records[0]
    found = masks.decode(segment_prompted(model, model.encode(record.read()), record, [kind])[kind], record.size)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(record.read())
    truth = record.object_masks()
    assert len(found) == len(record.truth) == len(clicks[0]) > 0
    for mask, of_object, own in zip(found, clicks[0].numpy(), truth, strict=True):
        assert own[of_object[:, 1].astype(int), of_object[:, 0].astype(int)].all()
        points = of_object if kind == "click3" else of_object[:1]
        given = dict(point_coords=points, point_labels=np.ones(len(points)), multimask_output=False)
        expected, _, low = predictor.predict(**given)
        if kind == "mask":
            expected, _, _ = predictor.predict(**given, mask_input=low)
        np.testing.assert_array_equal(mask, expected[0])


def test_figures_by_kind_are_means_over_objects(tiny_sam, records, scenes_config):
    model, classes = BoxPromptedSAM(tiny_sam), scenes_config["metainfo"]
    plain = evaluate(model, records, classes, None)
    first = evaluate(model, records, classes, None, kinds=ALL)
    assert {key: first.metrics[key] for key in plain.metrics} == plain.metrics and not plain.prompted
    kept = Evaluation.from_json(json.loads(json.dumps(first.to_json())))
    assert kept == first
    again = evaluate(model, records, classes, None, kept, kinds=ALL)
    for kind in ALL:
        assert again.metrics[f"IoU_fp_{kind}"] == 1 and again.metrics[f"mIoU_{kind}"] == first.metrics[f"mIoU_{kind}"]
        ious = []
        for record in records:
            found = masks.decode(first.prompted[kind].get(record.img_id, []), record.size)
            ious += mask_iou(found, record.object_masks()).tolist()
        assert first.metrics[f"mIoU_{kind}"] == pytest.approx(np.mean(ious))
    with torch.no_grad():
        for parameter in tiny_sam.prompt_encoder.point_embeddings[1].parameters():
            parameter.mul_(3)  # of foreground clicks
    changed = evaluate(model, records, classes, None, kept, kinds=ALL).metrics
    assert changed["IoU_fp"] == 1 > changed["IoU_fp_click1"], "the reference of a kind is of that kind"


def test_masks_that_are_found_again_are_counted_by_hand():
    wanted = [square(0, 0, 10), square(10, 10, 10), square(12, 0, 4)]
    found = [square(0, 0, 9), square(10, 10, 7), square(14, 0, 4), square(0, 0, 10)]
    # 81 of 100, 49 of 100: no, 8 of 24: no; the fourth finds the first a second time
    assert found_again(found, wanted) == 1
    assert found_again([*found, square(11, 10, 9)], wanted) == 2  # 81 of 100
    assert found_again([], wanted) == found_again(found, []) == 0
    half = [square(0, 0, 2), masks.encode(torch.eye(20).bool()[None])[0]]
    assert found_again([square(0, 0, 2)], half) == 1


def test_recall_of_everything_mode_by_hand(tiny_sam, records, monkeypatch):
    """A generator that finds the first object of every image, and half of the reference's masks."""
    truth = {record.img_id: record.truth_masks() for record in records}

    class Finder:
        def __init__(self, sam, output_mode, **settings):
            assert output_mode == "coco_rle" and settings["points_per_side"] == 3 and "num_images" not in settings
            self.images = iter(records)

        def generate(self, image):
            record = next(self.images)
            np.testing.assert_array_equal(image, record.read())
            return [{"segmentation": truth[record.img_id][0]}]

    monkeypatch.setattr(everything, "SamAutomaticMaskGenerator", Finder)
    options = EverythingOptions(num_images=2, points_per_side=3)
    empty = masks.encode(torch.zeros(1, *records[0].size, dtype=torch.bool))[0]
    reference = Everything({r.img_id: [truth[r.img_id][0], empty] for r in records[:2]}, 1.0)
    found, figures = segment_everything(tiny_sam, records, options, reference)
    overlapping = sum(found_again(truth[r.img_id][:1], truth[r.img_id]) for r in records[:2])
    assert overlapping == 2 and set(found.found) == {r.img_id for r in records[:2]} and found.seconds > 0
    assert figures == {
        "recall_everything": 2 / sum(len(record.truth) for record in records[:2]),
        "recall_fp_everything": 0.5,
    }


def test_everything_mode_is_segment_anythings(tiny_sam, records):
    options = EverythingOptions(
        num_images=1, points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    found, figures = segment_everything(tiny_sam, records, options)
    assert found.count > 4 and 0 <= figures["recall_everything"] <= 1 and "recall_fp_everything" not in figures
    again, figures = segment_everything(tiny_sam, records, options, found)
    assert again.found == found.found and figures["recall_fp_everything"] == 1
    (rles,) = found.found.values()
    assert masks.decode(rles, records[0].size).any()
    nothing, figures = segment_everything(
        tiny_sam, records, EverythingOptions(1, points_per_side=2, stability_score_thresh=1.0, pred_iou_thresh=1.0)
    )
    assert nothing.count == 0 and figures["recall_everything"] == 0
    _, figures = segment_everything(tiny_sam, records, options, nothing)
    assert "recall_fp_everything" not in figures, "there is nothing to be found again"


@pytest.mark.parametrize("kind", ["click3", "mask", "grid"])
def test_calibration_items_of_a_kind_are_the_same_whenever_asked_for(tiny_sam, records, kind):
    model = BoxPromptedSAM(tiny_sam)
    batches, other = (CalibrationBatches(model, records, 2, 0, ["box", kind, kind]) for _ in range(2))
    items = list(batches)
    plain = CalibrationBatches(model, records, 2, 0)[0]
    assert plain.keys() == items[0].keys() and all(torch.equal(plain[key], items[0][key]) for key in plain)
    for parameter in tiny_sam.mask_decoder.parameters():
        parameter.data.mul_(1.1)  # as if it were being quantized: mask inputs stay those of the model as it was
    for one, again, twin in zip(items, batches, other, strict=True):
        assert one.keys() == again.keys() == twin.keys()
        assert all(torch.equal(one[key], again[key]) and torch.equal(one[key], twin[key]) for key in one)
    with torch.no_grad():
        assert all(prompt_forward(tiny_sam, item)[0].isfinite().all() for item in items)


def test_clicks_of_calibration_lie_on_the_masks_that_true_boxes_have(tiny_sam, records):
    batch = CalibrationBatches(BoxPromptedSAM(tiny_sam), records, 2, 0, ["click3"] * 3)[0]
    mask = records[0].object_masks().any(0)
    x, y = batch["points"].reshape(-1, 2).int().unbind(1)  # the images have the size of the input: 64 pixels
    assert mask[y.numpy(), x.numpy()].all()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["click2"], "eval_prompts: unknown kind 'click2'; allowed: click1, click3, mask"),
        (["box"], "boxes are always measured"),
        ("mask", "must be a list of kinds of prompts, got 'mask'"),
        (3, "must be a list of kinds of prompts, got 3"),
        ([["mask"]], "unknown kind"),
    ],
)
def test_bad_kinds(kinds, message):
    with pytest.raises(ValueError, match=message):
        check_kinds(kinds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 3}, "everything: unknown key 'points'; allowed: num_images, points_per_side"),
        ({"num_images": True}, "everything: `num_images` must be a positive integer, got True"),
        ({"points_per_side": 0}, "`points_per_side` must be a positive integer, got 0"),
        ({"pred_iou_thresh": 1.5}, "`pred_iou_thresh` must be a number from 0 to 1, got 1.5"),
        ({"box_nms_thresh": float("nan")}, "`box_nms_thresh` must be a number from 0 to 1, got nan"),
        ([1], "everything must be a dict, got"),
    ],
)
def test_bad_options_of_everything_mode(options, message):
    with pytest.raises(ValueError, match=message):
        EverythingOptions.from_config(options)


def test_kinds_come_once():
    assert check_kinds(["mask", "click1", "mask"]) == ("mask", "click1")
