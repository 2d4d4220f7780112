# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from segment_anything import SamPredictor

from ahcq_plugin.mm import BoxPromptedSAM, NoDetector
from ahcq_plugin.mm.box_prompted_sam import clip_boxes
from ahcq_plugin.mm.data.images import original_image
from ahcq_plugin.zoo.sam import box_forward

BOXES = [[3.0, 4.0, 30.0, 41.0], [10.5, 0.0, 52.0, 20.0], [0.0, 0.0, 53.0, 87.0]]


@pytest.fixture
def image():
    """An odd size, smaller on one side than SAM's input and larger on the other."""
    return np.random.default_rng(0).integers(0, 256, (87, 53, 3), dtype=np.uint8)


def fixed(boxes=BOXES, scores=(0.9, 0.5, 0.04)):
    return dict(type="FixedDetector", boxes=boxes, scores=list(scores))


def test_masks_equal_those_of_the_official_predictor(tiny_sam, image):
    masks, iou = BoxPromptedSAM(tiny_sam).segment(image, torch.tensor(BOXES))
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    for box, mask, score in zip(BOXES, masks, iou, strict=True):
        expected, expected_iou, _ = predictor.predict(box=np.array(box), multimask_output=False)
        assert 0 < expected[0].mean() < 1
        np.testing.assert_array_equal(mask.numpy(), expected[0])
        assert score.item() == pytest.approx(expected_iou[0], abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunk_size_changes_nothing_but_the_chunks(tiny_sam, image, chunk):
    model = BoxPromptedSAM(tiny_sam, box_chunk=chunk)
    whole, whole_iou = BoxPromptedSAM(tiny_sam).segment(image, torch.tensor(BOXES))
    parts = list(model.decode(model.encode(image), torch.tensor(BOXES)))
    assert [len(masks) for masks, _ in parts] == [len(p) for p in torch.arange(3).split(chunk)]
    assert torch.equal(torch.cat([masks for masks, _ in parts]), whole)
    torch.testing.assert_close(torch.cat([iou for _, iou in parts]), whole_iou)


def test_calibration_batch_is_what_segmentation_computes(tiny_sam, image):
    model = BoxPromptedSAM(tiny_sam)
    batch = model.calibration_batch(image, torch.tensor(BOXES))
    assert batch["image"].shape == (1, 3, 64, 64) and batch["image"].dtype == batch["boxes"].dtype == torch.float32
    with torch.no_grad():
        logits, iou = box_forward(tiny_sam, batch)
        masks = tiny_sam.postprocess_masks(logits, (64, 39), (87, 53))[:, 0] > 0
    expected, expected_iou = model.segment(image, torch.tensor(BOXES))
    assert torch.equal(masks, expected)
    torch.testing.assert_close(iou[:, 0], expected_iou)
    assert not batch["image"][..., 39:].any(), "the padding is zero after normalisation"


def test_calibration_boxes_are_sampled_in_order_and_by_seed(tiny_sam, image):
    model = BoxPromptedSAM(tiny_sam)
    boxes = torch.arange(20.0)[:, None] + torch.tensor([0.0, 0.0, 5.0, 5.0])

    def draw(seed):
        batch = model.calibration_batch(image, boxes, 4, torch.Generator().manual_seed(seed))
        return batch["boxes"][:, 0]

    assert len(draw(0)) == 4 and (draw(0).diff() > 0).all()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_no_box_gives_no_mask_of_the_right_size(tiny_sam, image):
    masks, iou = BoxPromptedSAM(tiny_sam).segment(image, torch.zeros(0, 4))
    assert masks.shape == (0, 87, 53) and masks.dtype == torch.bool and iou.shape == (0,)


def test_boxes_outside_the_image_are_clipped(tiny_sam, image):
    model = BoxPromptedSAM(tiny_sam)
    outside = torch.tensor([[-20.0, 50.0, 300.0, 400.0], [60.0, 90.0, 70.0, 95.0], [7.0, 7.0, 8.0, 8.0]])
    inside = torch.tensor([[0.0, 50.0, 53.0, 87.0], [53.0, 87.0, 53.0, 87.0], [7.0, 7.0, 8.0, 8.0]])
    assert torch.equal(clip_boxes(outside, (87, 53)), inside)
    masks, iou = model.segment(image, outside)
    expected, expected_iou = model.segment(image, inside)
    assert torch.equal(masks, expected) and torch.equal(iou, expected_iou)


@pytest.mark.parametrize("boxes, message", [(torch.zeros(4), r"\(N, 4\)"), (torch.full((1, 4), torch.nan), "finite")])
def test_boxes_that_are_none_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        clip_boxes(boxes, (5, 5))


def test_predict_ranks_masks_by_score_times_iou_and_leaves_scores_alone(tiny_sam, sample):
    model = BoxPromptedSAM(tiny_sam, fixed())
    calls = []
    handle = tiny_sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    (out,) = model.predict(torch.zeros(1, 3, 64, 64), [sample])
    handle.remove()
    found = out.pred_instances
    assert len(calls) == 1, "the image encoder runs once per image"
    assert found.scores.tolist() == pytest.approx([0.9, 0.5]), "below score_thr there is no prompt"
    masks, iou = model.segment(original_image(sample), torch.tensor(BOXES[:2]))
    assert torch.equal(found.masks, masks)
    torch.testing.assert_close(found.mask_scores, iou * torch.tensor([0.9, 0.5]))


def test_predict_works_without_boxes(tiny_sam, sample):
    (out,) = BoxPromptedSAM(tiny_sam, fixed([], [])).predict(torch.zeros(1, 3, 64, 64), [sample])
    assert out.pred_instances.masks.shape == (0, 64, 64) and len(out.pred_instances.mask_scores) == 0


def test_at_most_max_boxes_the_best_first(tiny_sam, sample):
    model = BoxPromptedSAM(tiny_sam, fixed(scores=(0.3, 0.9, 0.6)), max_boxes=2)
    ((prompts),) = model.prompt(None, [sample])
    assert prompts.scores.tolist() == pytest.approx([0.9, 0.6])
    assert torch.equal(prompts.boxes, torch.tensor(BOXES)[[1, 2]])


def test_ground_truth_prompts_leave_crowds_out(tiny_sam, sample):
    sample.instances[0]["ignore_flag"] = 1
    (prompts,) = BoxPromptedSAM(tiny_sam).prompt(None, [sample])
    assert prompts.boxes.tolist() == [i["bbox"] for i in sample.instances[1:]] and (prompts.scores == 1).all()


def test_prompts_from_a_file_are_those_of_the_image_and_its_classes(tiny_sam, sample, tmp_path):
    rows = [
        dict(image_id=sample.img_id, category_id=9, bbox=[1, 2, 3, 4], score=0.5),
        dict(image_id=sample.img_id, category_id=7, bbox=[5, 5, 5, 5], score=0.75),
        dict(image_id=sample.img_id, category_id=8, bbox=[5, 5, 5, 5], score=0.99),
        dict(image_id=12345, category_id=7, bbox=[5, 5, 5, 5], score=0.99),
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(rows))
    (prompts,) = BoxPromptedSAM(tiny_sam, prompts=str(path), cat_ids=[7, 9]).prompt(None, [sample])
    assert prompts.boxes.tolist() == [[5, 5, 10, 10], [1, 2, 4, 6]] and prompts.labels.tolist() == [0, 1]


def test_the_detectors_preprocessor_is_delegated_to(tiny_sam):
    model = MODELS.build(dict(type="BoxPromptedSAM", sam=tiny_sam, detector=fixed()))
    assert model.data_preprocessor is model.detector.data_preprocessor


@pytest.mark.parametrize("shape", [(87, 53), (87, 53, 1)])
def test_a_grey_image_equals_its_rgb_copy(tiny_sam, image, shape):
    grey = image[..., 0].reshape(shape)
    metainfo = dict(ori_img=grey, ori_shape=shape[:2])
    rgb = original_image(DetDataSample(metainfo=metainfo))
    assert rgb.shape == (87, 53, 3) and all(np.array_equal(rgb[..., c], image[..., 0]) for c in range(3))


def test_an_image_in_memory_gives_the_pixels_of_its_file(sample):
    results = dict(img_path=sample.img_path, img_id=1)
    for step in ("LoadImageFromFile", "KeepOriginalImage"):
        results = TRANSFORMS.build(dict(type=step))(results)
    results["img"] = results["img"] * 0
    in_memory = DetDataSample(metainfo=dict(ori_img=results["ori_img"], ori_shape=(64, 64)))
    np.testing.assert_array_equal(original_image(in_memory), original_image(sample))


def test_an_image_without_pixels_or_of_another_size_is_refused(sample):
    with pytest.raises(ValueError, match="KeepOriginalImage"):
        original_image(DetDataSample(metainfo=dict(img_id=1)))
    sample.set_metainfo(dict(ori_shape=(64, 65)))
    with pytest.raises(ValueError, match=r"image of \(64, 64\), data sample says \(64, 65\)"):
        original_image(sample)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts="detector"), "needs a detector"),
        (dict(detector=NoDetector(), prompts="detector"), "needs a detector"),
        (dict(prompts="boxes.json"), "cat_ids"),
        (dict(box_chunk=0), "box_chunk"),
    ],
)
def test_bad_options_are_refused(tiny_sam, options, message):
    with pytest.raises(ValueError, match=message):
        BoxPromptedSAM(tiny_sam, **options)
