# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from ahcq_plugin.zoo import videos
from ahcq_plugin.zoo.clips import render_clip
from ahcq_plugin.zoo.segment import segment_clip
from ahcq_plugin.zoo.videos import read_videos, write_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "two", 2, seed=4, frames=5, size=64)


def test_generated_clips_come_back_from_their_folder(clips):
    videos = read_videos(clips, "davis")
    assert [video.name for video in videos] == ["clip000", "clip001"]
    for index, video in enumerate(videos):
        frames, masks = render_clip((4, index), 5, 64)
        assert video.annotated == list(range(5)) and len(video.objects) == masks.shape[1]
        for t in range(5):
            assert np.array_equal(video.masks(t), masks[t])
            assert np.abs(video.image(t).astype(int) - frames[t]).mean() < 8  # JPEG


def test_the_same_clips_are_not_drawn_again_and_others_are_not_overwritten(clips):
    before = (clips / "made_by.json").stat().st_mtime_ns
    assert write_clips(clips, 2, seed=4, frames=5, size=64) == clips
    assert (clips / "made_by.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other files"):
        write_clips(clips, 2, seed=5, frames=5, size=64)


@pytest.mark.parametrize("empty", [False, True])
def test_two_that_write_the_same_clips_at_once_both_get_them(tmp_path, monkeypatch, empty):
    folder, drawn = tmp_path / "clips", []
    if empty:
        folder.mkdir()

    def draw(*arguments):
        drawn.append(arguments)
        if len(drawn) == 1:  # another process starts and ends while this one draws
            assert write_clips(folder, 2, seed=4, frames=5, size=64) == folder
        return render_clip(*arguments)

    monkeypatch.setattr(videos.clips, "render_clip", draw)
    assert write_clips(folder, 2, seed=4, frames=5, size=64) == folder
    assert len(drawn) == 4 and len(read_videos(folder, "davis")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["clips"], "nothing is left behind"


def test_other_files_that_appear_meanwhile_are_kept(tmp_path, monkeypatch):
    folder = tmp_path / "clips"

    def draw(*arguments):
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
        return render_clip(*arguments)

    monkeypatch.setattr(videos.clips, "render_clip", draw)
    with pytest.raises(FileExistsError, match="other files"):
        write_clips(folder, 1, seed=4, frames=5, size=64)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def sav_folder(root):
    """One SA-V video of nine frames, two overlapping objects, annotated at 0, 4, 8; the second one is gone at 8."""
    (root / "JPEGImages_24fps" / "v1").mkdir(parents=True)
    for t in range(9):
        Image.fromarray(np.full((40, 60, 3), 20 * t, np.uint8)).save(root / f"JPEGImages_24fps/v1/{t:05d}.jpg")
    for name, corner in (("000", 5), ("001", 10)):
        folder = root / "Annotations_6fps" / "v1" / name
        folder.mkdir(parents=True)
        for t in (0, 4, 8):
            mask = np.zeros((40, 60), bool)
            mask[corner : corner + 15, corner : corner + 15] = not (name == "001" and t == 8)
            Image.fromarray(mask).save(folder / f"{t:05d}.png")
    (root / "sav_val.txt").write_text("v1\n")
    return root


def test_sav_layout(tmp_path):
    (video,) = read_videos(sav_folder(tmp_path), "sav", "val")
    assert len(video.frames) == 9 and video.annotated == [0, 4, 8] and video.objects == [0, 1]
    first, last = video.masks(0), video.masks(8)
    assert first.shape == (2, 40, 60) and (first[0] & first[1]).sum() == 100 and not last[1].any()


def test_a_frame_without_annotation_is_named(tmp_path, clips):
    root = sav_folder(tmp_path)
    (video,) = read_videos(root, "sav", "val")
    with pytest.raises(ValueError, match="video v1: frame 00001 has no annotation in .*v1"):
        video.masks(1)
    (root / "Annotations_6fps/v1/001/00000.png").unlink()
    (video,) = read_videos(root, "sav", "val")
    assert video.masks(0).any((1, 2)).tolist() == [True, False]
    (root / "Annotations_6fps/v1/000/00000.png").unlink()
    (video,) = read_videos(root, "sav", "val")
    with pytest.raises(ValueError, match="video v1: the first frame, 00000, has no annotation in .*v1; its masks say"):
        video.masks(0)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "JPEGImages/480p/clip000/00000.jpg",
            lambda path: path.unlink(),
            "an annotation of frame 00000, which is missing",
        ),
        (
            "JPEGImages/480p/clip000/00003.jpg",
            lambda path: path.unlink(),
            "an annotation of frame 00003, which is missing",
        ),
        ("JPEGImages/480p/clip000/00003.jpg", lambda path: path.write_bytes(b""), "00003.jpg is not a readable image"),
        ("JPEGImages/480p/clip000/00003.jpg", lambda path: Image.new("L", (9, 8)).save(path), r"\(8, 9\) pixels"),
        ("JPEGImages/480p/clip000/x.jpg", lambda path: path.write_bytes(b""), "frames are named by numbers"),
        (
            "Annotations/480p/clip000/00002.png",
            lambda path: path.write_bytes(b"x"),
            "00002.png is not a readable image",
        ),
        ("Annotations/480p/clip000/00000.png", lambda path: Image.new("RGB", (64, 64)).save(path), "has channels"),
        ("Annotations/480p/clip000/00000.png", lambda path: path.write_bytes(path.read_bytes()[:-40]), "00000.png"),
    ],
)
def test_a_quick_look_names_what_cannot_be_used(tmp_path, file, damage, message):
    folder = write_clips(tmp_path / "clips", 1, seed=4, frames=5, size=64)
    read_videos(folder, "davis")[0].check()
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        read_videos(folder, "davis")[0].check()


def test_a_quick_look_at_sav(tmp_path):
    read_videos(sav_folder(tmp_path), "sav")[0].check()


def test_every_second_frame_and_the_first_of_these(clips, tmp_path):
    whole, part = read_videos(clips, "davis")[1], read_videos(clips, "davis", every=2, max_frames=2)[1]
    assert [path.stem for path in part.frames] == ["00000", "00002"] and part.annotated == [0, 1]
    assert np.array_equal(part.masks(1), whole.masks(2))
    (video,) = read_videos(sav_folder(tmp_path), "sav", every=4)
    assert len(video.frames) == 3 and video.annotated == [0, 1, 2]
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        read_videos(clips, "davis", every=0)


def test_what_is_missing_is_named(tmp_path, clips):
    with pytest.raises(ValueError, match="unknown layout 'ytvos'"):
        read_videos(clips, "ytvos")
    with pytest.raises(FileNotFoundError, match="no list of videos .*val.txt"):
        read_videos(clips, "davis", "val")
    with pytest.raises(FileNotFoundError, match="JPEGImages_24fps"):
        read_videos(clips, "sav")
    with pytest.raises(ValueError, match="has no video horse"):
        read_videos(clips, "davis", names=["horse"])


def test_masks_equal_the_predictors_own_on_a_folder(clips):
    pytest.importorskip("sam2", reason="needs the sam2 package")
    from ahcq_plugin.zoo.sam2 import build_sam2
    from tests.zoo.test_clips import SMALL

    torch.manual_seed(0)
    model = build_sam2(SMALL, False)
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(20)
    video = next(video for video in read_videos(clips, "davis") if len(video.objects) > 1)
    first = video.masks(0)
    for non_overlap in (False, True):
        model.non_overlap_masks = non_overlap
        state = model.init_state(str(video.frame_dir))
        for n, mask in enumerate(first):
            model.add_new_mask(state, 0, n, mask)
        theirs = [(logits[:, 0] > 0).numpy() for _, _, logits in model.propagate_in_video(state)]
        model.non_overlap_masks = False
        images = [video.image(t) for t in range(5)]
        ours = list(segment_clip(model, images, first, non_overlap))
        assert len(ours) == 5 and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if non_overlap:
            assert all(frame.sum(0).max() <= 1 for frame in ours)
    assert any(frame.any() for frame in ours[1:])


def test_a_clip_without_objects_is_refused():
    with pytest.raises(ValueError, match="shows no object"):
        next(segment_clip(torch.nn.Identity(), [np.zeros((8, 8, 3), np.uint8)], np.zeros((1, 8, 8), bool), True))
