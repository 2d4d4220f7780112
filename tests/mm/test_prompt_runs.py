# SPDX-License-Identifier: Apache-2.0
"""Runs with mixed prompts, figures by prompt and everything mode; configs that ask for what there is not."""

from pathlib import Path

import pytest
import torch

from ahcq_plugin.mm import quantization_loop
from ahcq_plugin.mm.launch import read_config
from ahcq_plugin.mm.ptq_loop import Calibration, PTQLoop
from ahcq_plugin.ptq import AuditError, AuditReport
from ahcq_plugin.ptq.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ALL = ["click1", "click3", "mask"]
FIGURES = {f"{of}_{kind}" for of in ("mIoU", "IoU_fp") for kind in ALL}


@pytest.fixture
def blank_report(monkeypatch):
    monkeypatch.setattr(quantization_loop, "write_report", lambda path, data: Path(path).write_text("<html>"))


@pytest.fixture
def seen(monkeypatch):
    """The calibration items of every run, which ends there."""
    items = []

    def spy(model, batches, *args, **kwargs):
        items.append(list(batches))
        raise AuditError(AuditReport(["enough seen"]))

    monkeypatch.setattr(quantization_loop, "quantize", spy)
    return items


def test_figures_by_prompt_and_everything_mode_are_reported(run, tmp_path, request):
    everything = dict(num_images=1, points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    options = {
        "test_cfg.eval_prompts": ALL,
        "test_cfg.everything": everything,
        "test_cfg.calib.prompts": {"click3": 0.5, "mask": 0.5},
        "test_cfg.cache_dir": str(tmp_path / "cache"),
    }
    code, text, metrics = run(cfg_options=options)
    assert code == 0
    assert set(metrics["quantized"]) >= FIGURES | {"recall_everything", "recall_fp_everything", "IoU_fp"}
    assert all(0 < metrics["quantized"][name] < 1 for name in FIGURES)
    assert set(metrics["fp"]) >= {f"mIoU_{kind}" for kind in ALL} | {"recall_everything"}
    rows = metrics["everything"]
    assert rows["fp"]["images"] == rows["quantized"]["images"] == 1
    assert rows["fp"]["masks"] > 0 < rows["quantized"]["seconds_per_image"]
    html = (tmp_path / "out" / "report.html").read_text()
    for shown in (text, html):
        assert "IoU to FP masks, 3 clicks" in shown and "everything mode, true masks found" in shown
        assert f"{metrics['quantized']['mIoU_mask']:.4f}" in shown
        assert f"everything mode, fp: {rows['fp']['masks']} masks of 1 images" in shown
    notes = read_checkpoint(tmp_path / "out" / "quantized.pth").extra["notes"]
    assert sorted(notes["calibration_prompts"]) == ["click3", "mask"]
    request.getfixturevalue("blank_report")
    again = run(cfg_options=options)[2]
    assert again["fp"] == metrics["fp"] and again["everything"]["fp"] == rows["fp"], "kept by the first run"
    assert again["quantized"] == metrics["quantized"]


def test_boxes_alone_give_the_items_that_they_gave(run, seen):
    run()
    run(cfg_options={"test_cfg.calib.prompts": {"box": 1.0, "source": "gt"}})
    for one, other in zip(*seen, strict=True):
        assert one.keys() == other.keys() == {"image", "boxes"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupted_mixed_run_goes_on_with_the_same_items(run, blank_report, tmp_path):
    options = dict(
        recipe="qdrop", cfg_options={"recipe.iterations": 2, "test_cfg.calib.prompts": {"box": 0.5, "mask": 0.5}}
    )
    first = run(**options)[2]
    (tmp_path / "out" / "units" / "004.pt").unlink()
    assert run(resume=True, **options)[2]["quantized"] == first["quantized"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"calib.prompts": {"clicks": 1.0}},
            "prompts: unknown kind 'clicks'; allowed: box, click1, click3, mask, grid",
        ),
        ({"calib.prompts": {"box": 0.5}}, "prompts: the shares must add up to 1, got 0.5"),
        ({"calib.prompts": {"box": 0.9, "mask": 0.1}}, "a share of 0.1 of 2 images gives 'mask' none"),
        ({"calib.prompts": {}}, "prompts: the shares must add up to 1, got 0"),
        ({"calib.prompts": ["box"]}, "calib: `prompts` must be a name, a path or a dict of shares, got ['box']"),
        ({"calib.prompts": {"box": 1.0, "source": 3}}, "`prompts.source` must be 'detector', 'gt' or a path, got 3"),
        ({"calib.prompts": {"box": 1.0, "source": "detector"}}, "prompts='detector', but the config has NoDetector"),
        ({"calib.prompts": "absent.json"}, "no detections file absent.json"),
        ({"calib.num_images": True}, "calib: `num_images` must be a positive integer, got True"),
        ({"eval_prompts": ["box"]}, "eval_prompts: unknown kind 'box'; allowed: click1, click3, mask"),
        ({"everything": {"points": 3}}, "everything: unknown key 'points'; allowed: num_images"),
        ({"everything": 5}, "everything must be a dict, got 5"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(run, monkeypatch, options, message):
    monkeypatch.setattr(PTQLoop, "run", None)
    code, text, _ = run(cfg_options={f"test_cfg.{key}": value for key, value in options.items()})
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and message in text


def test_shares_and_the_source_of_boxes_are_told_apart():
    assert Calibration(prompts="gt").source == "gt" and Calibration(prompts="gt").shares is None
    mixed = Calibration(prompts={"source": "gt", "box": 0.5, "mask": 0.5})
    assert mixed.source == "gt" and mixed.shares == {"box": 0.5, "mask": 0.5}
    assert Calibration(prompts={"source": "gt"}).shares is None and Calibration().source is None


def test_a_dry_run_tries_every_kind(run, seen, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "mm_configs" / "sam_tiny_w4a4_all_prompts_coco.py"
    monkeypatch.setenv("AHCQ_DATA", str(tmp_path / "absent"))
    text = run(config, dry_run=True)[1]
    assert "dry run: 5 generated images" in text
    keys = {(*sorted(item), item["points"].shape[1] if "points" in item else 0) for (items) in seen for item in items}
    assert keys == {
        ("boxes", "image", 0),
        ("image", "labels", "points", 1),
        ("image", "labels", "points", 3),
        ("image", "labels", "masks", "points", 1),
    }


def test_the_config_of_all_prompts_mixes_and_measures_all():
    cfg = read_config(str(ROOT / "mm_configs" / "sam_tiny_w4a4_all_prompts_coco.py"))
    assert set(cfg.test_cfg.eval_prompts) == set(ALL)
    assert set(Calibration.from_config(cfg.test_cfg.calib).shares) == {"box", "grid", *ALL}
