# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a small SAM 2 on generated clips."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image
from rich.console import Console

from ahcq_plugin import load_quantized
from ahcq_plugin.mm.data.video_dataset import GeneratedClips
from ahcq_plugin.mm.dry_run import INPUT_SIZE, make_dry_run
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.mm.evaluation.video_evaluation import VideoEvaluation, evaluate_videos, keep_first_masks
from ahcq_plugin.mm.launch import launch, read_config
from ahcq_plugin.mm.preflight import preflight
from ahcq_plugin.mm.report.videos import GIF_WIDTH, WIDTH, sample_videos
from ahcq_plugin.mm.video_loop import CalibrationClips, VideoCalibration
from ahcq_plugin.support.workers import Workers
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.videos import Video
from tests.conftest import computing_state
from tests.zoo.test_clips import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small SAM 2 that takes every object for present."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_sam2(SMALL, False)
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(20)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def config(weights, tmp_path):
    """File of the demo's config, cut down to seconds."""
    clips = dict(type="GeneratedClips", data_root=str(tmp_path / "clips"), count=2, frames=4, size=64)
    calib = dict(dataset=dict(_delete_=True, **clips, seed=1), num_videos=1, num_frames=2, max_objects=1)
    content = dict(
        _base_=str(ROOT / "mm_configs" / "demo_sam2_tiny_w4a4.py"),
        sam=dict(_delete_=True, name=SMALL, checkpoint=str(weights)),
        recipe=dict(name="rtn", iterations=2),
        test_dataloader=dict(dataset=dict(_delete_=True, **clips)),
        test_cfg=dict(cache_dir=str(tmp_path / "cache"), calib=calib),
    )
    path = tmp_path / "small.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in content.items()))
    return path


def test_a_run_reports_every_sequence_and_its_checkpoint_is_what_was_measured(config, tmp_path, weights):
    out = io.StringIO()
    code = launch(str(config), work_dir=str(tmp_path / "out"), console=Console(file=out, width=120))
    assert code == 0, out.getvalue()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["audit"]["passed"] and set(metrics["sequences"]) == {"clip000", "clip001"}
    for part in ("fp", "quantized"):
        figures = metrics[part]
        assert figures["J&F"] == pytest.approx((figures["J"] + figures["F"]) / 2)
        assert f"{figures['J&F']:.4f}" in out.getvalue() and metrics["seconds_per_frame"][part] > 0
    assert 0 <= metrics["quantized"]["J_fp"] < 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 2 and "clip001" in page
    model = load_quantized(tmp_path / "out" / "quantized.pth", lambda _: build_sam2(SMALL, str(weights)))
    packed = load_quantized(tmp_path / "out" / "quantized.safetensors").state_dict()
    assert all(torch.equal(value, packed[name]) for name, value in computing_state(model).items())
    cfg = read_config(str(config)).test_dataloader.dataset
    videos = GeneratedClips(**{k: v for k, v in cfg.items() if k != "type"}).videos
    found = evaluate_videos(model, videos, JFMetric()).metrics
    assert found == {key: metrics["quantized"][key] for key in found}
    # the second run takes the floating-point figures from the cache
    assert launch(str(config), str(tmp_path / "again"), recipe="rtn", console=Console(file=io.StringIO())) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["fp"] == metrics["fp"] and again["quantized"] == metrics["quantized"]
    assert again["seconds_per_frame"]["fp"] == metrics["seconds_per_frame"]["fp"]


def test_true_masks_score_one_and_first_masks_kept_score_less(tmp_path):
    videos = GeneratedClips(str(tmp_path), count=3, frames=5, size=64, seed=2).videos
    following = iter(videos)

    def truth(model, images, first, non_overlap):
        assert non_overlap and len(list(images)) == 5
        video = next(following)
        return (video.masks(t) for t in range(5))

    perfect = evaluate_videos(torch.nn.Identity(), videos, JFMetric(), segment=truth)
    assert perfect.metrics == {"J&F": 1, "J": 1, "F": 1}
    copied = evaluate_videos(torch.nn.Identity(), videos, JFMetric(), perfect, segment=keep_first_masks)
    assert copied.metrics["J"] < 1 and copied.metrics["J_fp"] < 1
    assert VideoEvaluation.from_json(json.loads(json.dumps(copied.to_json()))) == copied
    (sample, *_) = sample_videos(videos, perfect, copied)
    assert sample.columns == [0, 1, 2, 3, 4] and sample.strips["FP"].shape == (WIDTH, 5 * WIDTH, 3)
    assert np.array_equal(sample.strips["ground truth"], sample.strips["FP"])
    assert not np.array_equal(sample.strips["FP"], sample.strips["quantized"])
    with Image.open(io.BytesIO(sample.gif)) as gif:
        assert gif.n_frames == 5 and gif.size == (3 * GIF_WIDTH, GIF_WIDTH)


def test_calibration_takes_first_frames_and_largest_objects(tmp_path):
    videos = GeneratedClips(str(tmp_path), count=3, frames=5, size=64, seed=2).videos
    items = CalibrationClips(videos, 32, num_frames=2, max_objects=1)
    for video, item in zip(videos, items, strict=True):
        assert item["frames"].shape == (2, 3, 32, 32) and item["masks"].shape == (1, 64, 64)
        assert item["masks"].sum() == video.masks(0).sum((1, 2)).max()


def test_first_masks_are_read_until_there_are_enough_videos(config, tmp_path, monkeypatch):
    cfg = read_config(str(config))
    cfg.work_dir = str(tmp_path / "out")
    cfg.test_cfg.calib.dataset.count, cfg.test_cfg.calib.num_videos = 5, 2
    loop = Runner.from_cfg(cfg).test_loop
    reads, masks = [], Video.masks

    def counted(video, index):
        reads.append(video.name)
        return masks(video, index)

    monkeypatch.setattr(Video, "masks", counted)
    items, _ = loop.calibration(loop.wrap(None), tune=True)
    assert len(items) == 2 and reads == items.names


def test_several_processes_are_refused_in_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "running", classmethod(lambda cls: Workers(0, 2)))
    out = io.StringIO()
    assert launch(str(config), work_dir=str(tmp_path / "out"), console=Console(file=out, width=80)) == 2
    assert out.getvalue() == "error: VideoPTQLoop runs in one process, got 2: start it without a launcher\n"


def test_a_video_without_an_object_in_its_first_frame_is_named(tmp_path, monkeypatch):
    videos = GeneratedClips(str(tmp_path), count=1, frames=2, size=64).videos
    monkeypatch.setattr(Video, "masks", lambda video, index: np.zeros((1, 64, 64), bool))
    with pytest.raises(DataError, match="video clip000: the first frame shows no object to follow"):
        evaluate_videos(torch.nn.Identity(), videos, JFMetric(), segment=keep_first_masks)


def test_bad_options_are_named(config):
    cfg = read_config(str(config), {"test_cfg.calib.num_videos": 0})
    with pytest.raises(ValueError, match="`num_videos` must be a positive integer, got 0"):
        preflight(cfg)
    with pytest.raises(ValueError, match="unknown key 'num_images'; allowed: dataset, seed, num_videos"):
        VideoCalibration.from_config(dict(num_images=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_cfg.leave": "x"}, "`leave` takes a list of names and globs, got 'x'"),
        ({"test_cfg.leave": [3]}, r"`leave` takes a list of names and globs, got \[3\]"),
        ({"test_dataloader.dataset.type": "NoSuchSet"}, "unknown data set 'NoSuchSet'"),
        ({"test_cfg.calib.dataset.type": "NoSuchSet"}, "unknown data set 'NoSuchSet'"),
        ({"test_dataloader.dataset.frames": 2}, "no annotated frame is left to measure"),
    ],
)
def test_what_would_fail_later_is_said_first(config, options, message):
    with pytest.raises(ValueError, match=message):
        preflight(read_config(str(config), options))


def test_a_dry_run_asks_for_the_data_sets_too(config):
    cfg = read_config(str(config), {"test_dataloader.dataset.type": "NoSuchSet"})
    cfg.work_dir = "out"
    with pytest.raises(ValueError, match="unknown data set 'NoSuchSet'"):
        make_dry_run(cfg)


@pytest.mark.parametrize("leaf", ["sam2_t_w4a4_davis", "sam2_bp_w6a6_sav"])
def test_missing_data_say_where_they_come_from(leaf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder data/.*(davischallenge|ai.meta.com).*--dry-run"):
        preflight(read_config(str(ROOT / "mm_configs" / f"{leaf}.py")))


@pytest.mark.parametrize("leaf", ["sam2_t_w4a4_davis", "sam2_s_w4a4_sav", "demo_sam2_tiny_w4a4"])
def test_a_dry_run_needs_no_data_and_keeps_the_model_but_its_input(leaf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = read_config(str(ROOT / "mm_configs" / f"{leaf}.py"))
    cfg.work_dir, name = "out", cfg.sam.name
    notes = make_dry_run(cfg)
    assert "2 generated clips" in notes[0] and f"{INPUT_SIZE} pixels" in notes[1]
    preflight(cfg)  # finds its data, builds its model
    small = build_sam2(dict(cfg.sam.name), checkpoint=False)
    full = build_sam2({"name": name} if name != "sam2_tiny" else packaged_config("sam2_tiny"), checkpoint=False)
    same = {n: p.shape for n, p in full.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert same and small.image_size == INPUT_SIZE and cfg.test_cfg.cache_dir is None
