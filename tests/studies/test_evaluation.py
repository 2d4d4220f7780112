# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ahcq_plugin.studies.evaluation.iou import blind, compare, filled_box, filled_ellipse, mean_iou_by_size
from ahcq_plugin.studies.evaluation.precision import detector_prompts, ground_truth_prompts, mask_ap
from ahcq_plugin.studies.evaluation.report import evaluate, evaluation_tables, statistics_tables
from ahcq_plugin.studies.evaluation.rtn import PARTS, round_rows, round_weights
from ahcq_plugin.studies.evaluation.stats import activation_statistics, channel_kind
from ahcq_plugin.studies.tensors import channel_ranges, condition_numbers, sample
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch, predict_masks
from ahcq_plugin.zoo.sam import build_sam
from ahcq_plugin.zoo.scenes import box_of, write_coco


def test_baselines_fill_their_box_and_no_more():
    box = np.array([10, 5, 40, 25], np.float32)
    assert box_of(filled_box(box, (30, 50))) == (10, 5, 40, 25)
    ellipse = filled_ellipse(box, (30, 50))
    assert box_of(ellipse) == (10, 5, 40, 25)
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 30 * 20, rel=0.02)


def test_mean_iou_counts_objects_by_area():
    items = list(scene_items(6, seed=0, size=200))
    table = mean_iou_by_size(
        items, {"truth": lambda item: item.masks, "nothing": lambda item: [np.zeros_like(m) for m in item.masks]}
    )
    counts = table["objects"]
    assert counts["all"] == sum(len(item.masks) for item in items)
    assert counts["all"] == counts["small"] + counts["medium"] + counts["large"]
    for size, count in counts.items():
        assert count == 0 or (table["truth"][size] == 1 and table["nothing"][size] == 0)


def test_a_blind_model_gives_the_same_masks_for_every_image(tiny_sam):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    boxes = np.array([[4, 4, 40, 30], [20, 10, 60, 60]], np.float32)
    unseeing = blind(tiny_sam)
    (first, a), (second, b) = (predict_masks(unseeing, image, boxes) for image in images)
    assert np.array_equal(first, second) and np.array_equal(a, b)
    grey = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(unseeing.image_encoder(grey), tiny_sam.image_encoder(grey))


def test_an_image_is_scaled_and_padded_with_its_boxes(tiny_sam):
    image = np.full((50, 100, 3), 200, np.uint8)
    batch = make_batch(tiny_sam, image, np.array([[10, 20, 90, 40]], np.float32))
    assert torch.allclose(batch["boxes"], torch.tensor([[6.4, 12.8, 57.6, 25.6]]))
    assert batch["image"].shape == (1, 3, 64, 64)
    assert not batch["image"][:, :, 32:].any() and batch["image"][:, :, :32].all()
    assert predict_masks(tiny_sam, image, np.array([[10, 20, 90, 40]]))[0].shape == (1, 50, 100)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_that_of_the_formula(bits):
    """As the packaged model's card was made: the formula written out, on all its weights."""
    for module in build_sam("sam_tiny").modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            rows, top = module.weight.detach().flatten(1), 2**bits - 1
            low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
            zero = torch.round(-low / scale)
            expected = ((torch.round(rows / scale) + zero).clamp(0, top) - zero) * scale
            assert torch.equal(round_rows(module.weight.detach(), bits).flatten(1), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded_rows_lie_on_a_grid_of_their_own_and_stay_there(bits):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [5], [0], [2]])
    rounded = round_rows(weight, bits)
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / (2**bits - 1)
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    # half a step, and as much again where rounding the zero point shifts the grid at the ends of the range
    assert ((rounded - weight).abs() <= step[:, None] * 1.0001).all()
    torch.testing.assert_close(round_rows(rounded, bits), rounded, rtol=1e-4, atol=1e-6)


def test_only_the_parts_asked_for_are_rounded(tiny_sam):
    rounded = round_weights(tiny_sam, 3, PARTS[:1])
    before, after = tiny_sam.state_dict(), rounded.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"image_encoder"}
    with pytest.raises(ValueError, match=r"`bits` must be an integer in \[2, 16\], got 1"):
        round_weights(tiny_sam, 1)


def test_condition_number_is_that_of_the_matrix():
    layer = torch.nn.Linear(3, 3)
    layer.weight.data = torch.diag(torch.tensor([8.0, 2.0, 0.5]))
    assert condition_numbers(torch.nn.Sequential(layer)) == {"0": pytest.approx(16)}


def test_a_sample_spans_its_tensor_and_channels_are_those_of_the_last_axis():
    x = torch.arange(24.0).view(2, 3, 4)
    assert sample(x, 100).tolist() == list(range(24)) and sample(x, 6).tolist() == [0, 4, 8, 12, 16, 20]
    assert channel_ranges(x).tolist() == [[0, 1, 2, 3], [20, 21, 22, 23]]


def test_statistics_cover_every_attention_and_mlp_and_leave_no_hook(tiny_sam):
    result = activation_statistics(tiny_sam, scene_items(1, seed=0, size=64))
    attentions = [n for n, m in tiny_sam.named_modules() if type(m).__name__ == "Attention"]
    assert sorted(result["softmax"]) == sorted(attentions)
    assert {n for n in result["gelu"] if "blocks" in n} == {f"image_encoder.blocks.{i}.mlp.act" for i in range(2)}
    assert set(result["channels"]) == {
        n for n, m in tiny_sam.named_modules() if isinstance(m, torch.nn.Linear) and channel_kind(n)
    }
    assert all(0 <= row["min"] <= row["p50"] <= row["max"] <= 1 for row in result["softmax"].values())
    assert all(row["min"] >= -0.18 for row in result["gelu"].values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_sam.modules())
    tables = statistics_tables(condition_numbers(tiny_sam), result)
    assert "token-to-image V" in tables and "encoder Query/Key/Value" in tables


def test_true_masks_have_full_precision_and_worse_ones_less(tmp_path, tiny_sam, monkeypatch):
    folder = write_coco(tmp_path / "scenes", count=3, seed=0, size=64).parent
    truth = {item.image.tobytes(): item.masks for item in coco_items(folder)}
    monkeypatch.setattr(
        "ahcq_plugin.studies.evaluation.precision.predict_masks",
        lambda sam, image, boxes: (np.array(truth[image.tobytes()]), None),
    )
    result = mask_ap(tiny_sam, folder, ground_truth_prompts(folder))
    assert result["model"]["AP"] == pytest.approx(1)
    assert 0 < result["filled box"]["AP"] < 1


def test_detections_below_the_lowest_score_are_no_prompts(tmp_path):
    folder = write_coco(tmp_path / "scenes", count=2, seed=0, size=64).parent
    detections = [{"image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 20], "score": score} for score in (0.9, 0.04)]
    ((image_id, _, boxes, categories, scores),) = detector_prompts(folder, detections, lowest=0.05)
    assert image_id == 1 and boxes.tolist() == [[2, 3, 12, 23]] and categories == [1] and scores == [0.9]


def test_report_has_every_figure(tmp_path, tiny_sam):
    folder = write_coco(tmp_path / "scenes", count=2, seed=0, size=64).parent
    result = evaluate(tiny_sam, folder, scenes=2)
    assert set(result["iou"]) == set(result["rtn"]) == {"scenes", "images"}
    assert set(result["rtn"]["images"]) == {"encoder", "decoder", "both"}
    assert set(result["rtn"]["images"]["both"]) == {"8", "4", "3", "2"}
    assert set(result["ap"]["ground-truth boxes"]) == {"model", "filled box", "ellipse"}
    model = result["iou"]["scenes"]["model"]["all"]
    assert f"{model:.3f}" in evaluation_tables(result)
    assert result["rtn"]["scenes"]["both"]["8"] == pytest.approx(model, abs=0.05)
    assert compare(tiny_sam, scene_items(2, size=64))["model"]["all"] == model


def test_a_folder_that_is_missing_is_said_before_anything_is_computed(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        evaluate(torch.nn.Identity(), tmp_path / "nowhere")
