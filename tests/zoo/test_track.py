# SPDX-License-Identifier: Apache-2.0
"""Clips in memory give what the predictor gives for a folder; SAM 2 is built as published."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("sam2")
from ahcq_plugin.zoo.sam2 import PUBLISHED, build_sam2
from ahcq_plugin.zoo.track import clip_forward, start_state, track, without_inference_mode


def test_a_clip_in_memory_is_tracked_as_the_predictor_tracks_a_folder(small_sam2, small_clips, tmp_path):
    generator = np.random.default_rng(0)
    for number in range(3):
        image = generator.integers(0, 255, (48, 80, 3), np.uint8)
        assert cv2.imwrite(str(tmp_path / f"{number:05d}.jpg"), image)
    state = small_sam2.init_state(str(tmp_path))
    masks = small_clips[0]["masks"][:, :48]
    expected = []
    for number, mask in enumerate(masks):
        small_sam2.add_new_mask(state, 0, number, mask)
    for _, _, logits in small_sam2.propagate_in_video(state):
        expected.append(logits[:, 0])
    got = list(track(small_sam2, state["images"], masks, size=(48, 80)))
    assert [frame for frame, _ in got] == [0, 1, 2]
    assert torch.equal(torch.stack([logits for _, logits in got]), torch.stack(expected))
    assert set(start_state(small_sam2, state["images"], (48, 80))) == set(state)


def test_clip_forward_is_the_predictor_without_inference_mode(small_sam2, small_clips, capsys):
    clip = small_clips[0]
    before = dict(vars(small_sam2))
    assert clip_forward(small_sam2, clip).requires_grad
    with torch.no_grad():
        got = clip_forward(small_sam2, clip)
    assert got.shape == (3, 2, 64, 64) and not got.is_inference() and not got.requires_grad
    expected = torch.stack([logits for _, logits in track(small_sam2, clip["frames"], clip["masks"])])
    assert torch.equal(got, expected)
    assert dict(vars(small_sam2)).keys() == before.keys()
    assert "propagate" not in capsys.readouterr().err


def test_masks_depend_on_the_memory(small_sam2, small_clips):
    """Otherwise equality of quantized and original masks would say little."""
    clip = small_clips[0]
    masks = clip_forward(small_sam2, clip)
    other = clip_forward(small_sam2, {**clip, "masks": ~clip["masks"]})
    tracked = masks[1:]
    assert tracked.std() > 0.01 and tracked.min() > -100
    assert (tracked - other[1:]).abs().max() > 1e-3
    assert (tracked[:, 0] - tracked[:, 1]).abs().max() > 1e-3


def test_the_decorators_come_back_after_an_error(small_sam2):
    with pytest.raises(KeyError), without_inference_mode(small_sam2):
        raise KeyError
    with torch.enable_grad():
        assert "add_new_mask" not in vars(small_sam2)


def test_bad_clips_are_refused(small_sam2):
    with pytest.raises(ValueError, match=r"`frames` must be \(T, 3, 64, 64\), got \(2, 3, 32, 32\): resize them"):
        clip_forward(small_sam2, {"frames": torch.zeros(2, 3, 32, 32), "masks": torch.ones(1, 32, 32).bool()})
    for shape in ((0, 64, 64), (64, 64)):
        with pytest.raises(ValueError, match=r"`masks` must be \(N, h, w\) with N >= 1"):
            clip_forward(small_sam2, {"frames": torch.zeros(2, 3, 64, 64), "masks": torch.ones(shape).bool()})


def test_published_models_are_named_by_generation_and_size():
    sizes = ("t", "s", "bp", "l")
    assert list(PUBLISHED) == [*(f"sam2_{size}" for size in sizes), *(f"sam2.1_{size}" for size in sizes)]
    base = PUBLISHED["sam2.1_bp"]
    assert base.config == "configs/sam2.1/sam2.1_hiera_b+.yaml"
    assert base.checkpoint.url.endswith("/segment_anything_2/092824/sam2.1_hiera_base_plus.pt")
    model = build_sam2({"name": "sam2_t", "image_size": 64}, checkpoint=False)
    assert model.image_size == 64 and model.fill_hole_area == 0 and not model.training
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(38.9e6, rel=0.01)


def test_weights_are_loaded_bare_and_as_published(small_sam2, tmp_path):
    from tests.conftest import SMALL_SAM2

    state = small_sam2.state_dict()
    for name, content in (("bare.pt", state), ("published.pt", {"model": state})):
        torch.save(content, tmp_path / name)
        loaded = build_sam2(SMALL_SAM2, tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("sam3_t", False, "unknown model 'sam3_t', allowed: sam2_tiny, sam2_t, "),
        ({"name": "sam2_t", "depth": 3}, False, r"keys beside 'name' and 'image_size': \['depth'\]"),
        ({"name": "sam2_t", "image_size": 100}, False, "`image_size` must be a multiple of 32, got 100"),
        ({"image_size": 64}, False, "missing keys"),
        ("sam2_t", True, "must be a path, None or False"),
    ],
)
def test_bad_names_are_refused(name, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        build_sam2(name, checkpoint)


def test_a_missing_weight_file_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"download https://.*/072824/sam2_hiera_large.pt and put it there"):
        build_sam2("sam2_l")
