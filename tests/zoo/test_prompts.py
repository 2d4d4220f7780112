# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything import SamPredictor
from segment_anything.utils.amg import build_point_grid

from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.prompts import (
    KINDS,
    assign_kinds,
    check_shares,
    draw_clicks,
    foreground,
    input_prompts,
    item_generator,
    mixed_items,
    prompt_forward,
    prompt_item,
)
from ahcq_plugin.zoo.sam import box_forward

SHARES = {"box": 0.4, "click1": 0.2, "click3": 0.2, "mask": 0.1, "grid": 0.1}


@pytest.fixture
def scene():
    return next(iter(scene_items(1, seed=3, size=96)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_clicks_are_different_pixels_inside_the_mask(count, height, width, seed):
    masks = np.random.default_rng(seed).random((3, height, width)) < [[[0.02]], [[0.3]], [[0.9]]]
    boxes = torch.tensor([[1.0, 0.5, width - 1, height - 0.5]]).expand(3, 4)
    clicks = draw_clicks(count, boxes, (height, width), masks, torch.Generator().manual_seed(seed))
    assert clicks.shape == (3, count, 2) and clicks.dtype == torch.float32
    for mask, of_mask, (x0, y0, x1, y1) in zip(masks, clicks.tolist(), boxes.tolist(), strict=True):
        if mask.any():
            assert all(mask[int(y), int(x)] and (x, y) == (int(x), int(y)) for x, y in of_mask)
            assert len({tuple(click) for click in of_mask}) == min(count, mask.sum())
        else:
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in of_mask)


def test_every_pixel_of_a_mask_is_as_likely():
    mask = np.zeros((1, 3, 4), bool)
    mask[0, 1, :3] = True
    generator, hits = torch.Generator().manual_seed(0), np.zeros((3, 4))
    for _ in range(600):
        ((x, y),) = draw_clicks(1, torch.zeros(1, 4), (3, 4), mask, generator)[0].int().tolist()
        hits[y, x] += 1
    assert not hits[~mask[0]].any() and (abs(hits[mask[0]] - 200) < 60).all()


def test_without_masks_clicks_lie_in_the_box_and_in_the_image():
    boxes = torch.tensor([[2.0, 3.0, 9.0, 5.0], [-8.0, 4.0, 40.0, 90.0]])
    clicks = draw_clicks(50, boxes, (8, 10), generator=torch.Generator().manual_seed(0))
    x, y = clicks.unbind(2)
    assert ((x[0] >= 2) & (x[0] <= 9) & (y[0] >= 3) & (y[0] <= 5)).all() and x[0].std() > 1
    assert x[1].min() == 0 and x[1].max() == 9 and y[1].min() >= 4 and y[1].max() == 7


@pytest.mark.parametrize(("kind", "tokens"), [("box", 2), ("click1", 2), ("click3", 4), ("mask", 2), ("grid", 2)])
def test_every_kind_gives_an_item_that_depends_on_the_generator_alone(tiny_sam, scene, kind, tokens):
    boxes, masks = torch.from_numpy(scene.boxes), scene.masks

    def draw(seed):
        return prompt_item(tiny_sam, scene.image, boxes, masks, kind, 2, item_generator(seed, 0))

    one, again = draw(0), draw(0)
    assert one.keys() == again.keys() and all(torch.equal(one[key], again[key]) for key in one)
    if kind != "box":
        assert not torch.equal(one["points"], draw(1)["points"])
    with torch.no_grad():
        logits, iou = prompt_forward(tiny_sam, one)
    assert logits.shape == (2, 1, 32, 32) and iou.shape == (2, 1)
    points = (one["points"], one["labels"]) if "points" in one else None
    sparse, _ = tiny_sam.prompt_encoder(points=points, boxes=one.get("boxes"), masks=one.get("masks"))
    assert sparse.shape[1] == tokens


def test_grid_points_are_those_of_everything_mode(tiny_sam, scene):
    item = prompt_item(tiny_sam, scene.image, torch.zeros(0, 4), kind="grid", most=7)
    grid = {tuple(point) for point in (build_point_grid(32) * 64).astype(np.float32).tolist()}  # 96 pixels fill 64
    points = [tuple(point) for point in item["points"][:, 0].tolist()]
    assert len(points) == 7 == len(set(points) & grid)


def test_mask_inputs_are_the_logits_of_the_same_click(tiny_sam, scene):
    args = (tiny_sam, scene.image, torch.from_numpy(scene.boxes), scene.masks)
    item = prompt_item(*args, "mask", 2, item_generator(0, 0))
    click = prompt_item(*args, "click1", 2, item_generator(0, 0))
    with torch.no_grad():
        assert torch.equal(item["masks"], prompt_forward(tiny_sam, click)[0])
    assert torch.equal(item["points"], click["points"]) and item["masks"].std() > 0


def test_boxes_through_either_forward_are_the_same(tiny_sam, tiny_items):
    for item in tiny_items:
        with torch.no_grad():
            pairs = zip(prompt_forward(tiny_sam, item), box_forward(tiny_sam, item), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", ["click1", "click3", "mask"])
def test_masks_are_those_of_the_official_predictor(tiny_sam, kind):
    image = np.random.default_rng(0).integers(0, 256, (87, 53, 3), dtype=np.uint8)
    boxes = torch.tensor([[3.0, 4.0, 30.0, 41.0], [10.5, 0.0, 52.0, 20.0]])
    item = prompt_item(tiny_sam, image, boxes, None, kind, 2, item_generator(0, 0))
    with torch.no_grad():
        logits, iou = prompt_forward(tiny_sam, item)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    clicks = draw_clicks({"click3": 3}.get(kind, 1), boxes, (87, 53), None, item_generator(0, 0)).numpy()
    for click, low, score in zip(clicks, logits, iou, strict=True):
        given = dict(point_coords=click, point_labels=np.ones(len(click)), multimask_output=False)
        _, expected_iou, expected = predictor.predict(**given)
        if kind == "mask":
            _, expected_iou, expected = predictor.predict(**given, mask_input=expected)
        np.testing.assert_allclose(low.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(score.numpy(), expected_iou, atol=1e-6)


def test_points_are_scaled_as_the_official_predictor_does(tiny_sam):
    points = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(0)) * 50
    given = input_prompts(tiny_sam, foreground(points), (87, 53))
    expected = SamPredictor(tiny_sam).transform.apply_coords(points.numpy(), (87, 53))
    assert torch.equal(given["points"], torch.as_tensor(expected, dtype=torch.float)) and (given["labels"] == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any), st.integers(50, 90), st.integers(0, 99))
def test_kinds_come_as_often_as_their_shares_say(weights, count, seed):
    shares = {kind: weight / sum(weights) for kind, weight in zip(KINDS, weights, strict=True)}
    kinds = assign_kinds(shares, count, seed)
    assert len(kinds) == count and kinds == assign_kinds(shares, count, seed)
    assert all(abs(kinds.count(kind) - share * count) < 1 + 1e-6 for kind, share in shares.items())


def test_mixed_items_are_deterministic_and_of_the_kinds_asked_for(tiny_sam):
    images = list(scene_items(10, seed=5, size=64))
    items, again = (mixed_items(tiny_sam, images, SHARES, most=2, seed=1) for _ in range(2))
    for one, other in zip(items, again, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    kinds = sorted(kind_of(item) for item in items)
    assert kinds == sorted(["box"] * 4 + ["click1"] * 3 + ["click3"] * 2 + ["mask"]), "the grid's are single clicks"
    other = [kind_of(item) for item in mixed_items(tiny_sam, images, SHARES, most=2, seed=2)]
    assert other != [kind_of(item) for item in items]


def kind_of(item) -> str:
    return "mask" if "masks" in item else "box" if "boxes" in item else f"click{item['points'].shape[1]}"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"point": 1}, "unknown kind 'point'; allowed: box, click1, click3, mask, grid"),
        ({"box": 0.5, "mask": 0.4}, "add up to 1, got 0.9"),
        ({"box": 1.5, "mask": -0.5}, "share of 'box' must be a number from 0 to 1, got 1.5"),
        ({"box": True}, "share of 'box' must be a number from 0 to 1, got True"),
        ({"box": float("nan")}, "got nan"),
        ({"box": "half"}, "got 'half'"),
        ({}, "add up to 1, got 0"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(ValueError, match=message):
        check_shares(shares)


def test_a_share_that_gives_no_image(tiny_sam, scene):
    with pytest.raises(ValueError, match="a share of 0.01 of 8 images gives 'mask' none"):
        assign_kinds({"box": 0.99, "mask": 0.01}, 8, 0)
    with pytest.raises(ValueError, match="unknown kind of prompt 'boxes'; allowed: box"):
        prompt_item(tiny_sam, scene.image, torch.zeros(0, 4), kind="boxes")


@pytest.mark.parametrize("keys", [(), ("box",), ("points",), ("labels", "boxes")])
def test_an_item_without_a_prompt_says_what_it_lacks(tiny_sam, keys):
    batch = {"image": torch.zeros(1, 3, 64, 64)} | {key: torch.zeros(1, 4) for key in keys}
    with pytest.raises(ValueError, match="some of boxes, points, labels, masks, points with labels; got"):
        prompt_forward(tiny_sam, batch)
