# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from ahcq_plugin.zoo.scenes import MIN_AREA, box_of, encode_rle, render_scene, write_coco

SEEDS = range(12)


def test_a_seed_decides_the_scene():
    first, second, other = render_scene(5, 64), render_scene(5, 64), render_scene(6, 64)
    assert np.array_equal(first[0], second[0])
    assert len(first[1]) == len(second[1])
    assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", [64, 100, 256])
def test_masks_are_disjoint_visible_parts_of_at_least_the_smallest_area(size):
    objects = 0
    for seed in SEEDS:
        image, masks = render_scene(seed, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert all(mask.shape == (size, size) and mask.dtype == bool for mask in masks)
        assert all(mask.sum() >= MIN_AREA * size * size for mask in masks)
        assert not masks or np.sum(masks, 0).max() == 1
        objects += len(masks)
    assert objects >= 3 * len(SEEDS)


def test_objects_differ_from_what_surrounds_them():
    # with only blur, noise and light between mask and picture, most objects must show in the mean colour around them
    visible = []
    for seed in SEEDS:
        image, masks = render_scene(seed, 128)
        for mask in masks:
            x0, y0, x1, y1 = box_of(mask)
            near = np.zeros_like(mask)
            near[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3] = True
            near &= ~mask
            if near.any():
                visible.append(np.abs(image[mask].mean(0) - image[near].mean(0)).max() > 12)
    assert np.mean(visible) > 0.8


def test_boxes_are_tight():
    mask = np.zeros((9, 11), bool)
    mask[2:5, 3] = mask[4, 3:8] = True
    assert box_of(mask) == (3, 2, 8, 5)
    for seed in SEEDS:
        for mask in render_scene(seed, 64)[1]:
            x0, y0, x1, y1 = box_of(mask)
            assert mask.sum() == mask[y0:y1, x0:x1].sum()
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_run_lengths_are_exact(fill):
    mask = np.random.default_rng(0).random((7, 5)) < fill
    coco = COCO()
    coco.dataset = {"images": [{"id": 1, "height": 7, "width": 5}]}
    coco.createIndex()
    assert sum(encode_rle(mask)["counts"]) == mask.size
    assert np.array_equal(coco.annToMask({"image_id": 1, "segmentation": encode_rle(mask)}), mask)


def test_pycocotools_reads_back_the_very_masks(tmp_path):
    path = write_coco(tmp_path / "data" / "scenes", count=3, seed=4, size=96)
    coco = COCO(str(path))
    assert sorted(coco.imgs) == [1, 2, 3]
    for index in range(3):
        _, masks = render_scene((4, index), 96)
        annotations = coco.loadAnns(coco.getAnnIds(index + 1))
        assert len(annotations) == len(masks)
        for annotation, mask in zip(annotations, masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == box_of(mask)
            assert annotation["area"] == mask.sum()


def test_image_files_hold_the_scene_without_loss(tmp_path):
    import cv2

    path = write_coco(tmp_path / "scenes", count=1, seed=9, size=64)
    stored = cv2.imread(str(path.parent / "images" / "000000.png"))[..., ::-1]
    assert np.array_equal(stored, render_scene((9, 0), 64)[0])


def test_a_matching_folder_is_used_again_and_another_is_refused(tmp_path):
    path = write_coco(tmp_path / "scenes", count=2, seed=1, size=64)
    before = path.stat().st_mtime_ns
    assert write_coco(tmp_path / "scenes", count=2, seed=1, size=64) == path
    assert path.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds other files"):
        write_coco(tmp_path / "scenes", count=3, seed=1, size=64)
    assert json.loads(path.read_text())["info"]["count"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]  # nothing half-written stays behind


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="`size` must be at least 32 pixels, got 16"):
        render_scene(0, 16)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        write_coco(tmp_path / "scenes", count=0)
