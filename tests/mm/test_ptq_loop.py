# SPDX-License-Identifier: Apache-2.0
"""Whole runs with a small SAM on three generated images."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.runner import Runner

from ahcq_plugin import load_quantized
from ahcq_plugin.graph import UnitError
from ahcq_plugin.mm import BoxPromptedSAM, ptq_loop, quantization_loop
from ahcq_plugin.mm.detectors.convert_yolox import build_yolox
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation.image_evaluation import evaluate
from ahcq_plugin.mm.launch import read_config
from ahcq_plugin.ptq import AuditError, AuditReport, Recipe
from ahcq_plugin.support.lock import locked
from ahcq_plugin.zoo.sam import build_sam
from tests.conftest import computing_state

ROOT = Path(__file__).resolve().parents[2]
FILES = ("quantized.pth", "quantized.safetensors")
STAGES = [
    "detect",
    "fp_eval",
    "prepare",
    "precondition",
    "calibrate",
    "reconstruct",
    "freeze",
    "audit",
    "quantized_eval",
]


@pytest.fixture(autouse=True)
def blank_report(request, monkeypatch):
    """Drawing the report takes longer than the run; one test draws it."""
    if "real_report" not in request.fixturenames:
        monkeypatch.setattr(quantization_loop, "write_report", lambda path, data: Path(path).write_text("<html>"))


@pytest.fixture
def real_report():
    """Turns ``blank_report`` off."""


def test_a_run_writes_what_the_table_shows(run, tmp_path, real_report):
    code, text, metrics = run()
    assert code == 0
    assert list(metrics) == ["fp", "quantized", "audit", "coverage", "recipe", "bits", "stages", "files"]
    assert (metrics["recipe"], metrics["bits"]) == ("rtn", [4, 4])
    shares = metrics["coverage"]["shares"]
    assert sum(kind["macs"] for kind in shares.values()) == pytest.approx(1) and "integers: " in text
    assert metrics["audit"]["passed"] is True and metrics["audit"]["counts"]["weight"] > 0
    assert list(metrics["stages"]) == STAGES
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 10**7 for stage in metrics["stages"].values())
    for part in ("fp", "quantized"):
        assert {"AP", "AP50", "mIoU"} <= metrics[part].keys() and 0 < metrics[part]["mIoU"] < 1
        assert f"{metrics[part]['mIoU']:.4f}" in text
    assert 0 < metrics["quantized"]["IoU_fp"] < 1 and "AP_gt" not in metrics["fp"], "the only prompts are true boxes"
    assert {path.name for path in (tmp_path / "out").glob("*.*")} >= {"metrics.json", "report.html", *FILES}
    assert not list((tmp_path / "out").glob(".*")), "no temporary file is left"
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in FILES}
    assert metrics["files"] == sizes and sizes["quantized.safetensors"] < sizes["quantized.pth"]
    shown = f"quantized.safetensors: {sizes['quantized.safetensors'] / 1e6:.2f} MB"
    assert text.rstrip().endswith(shown) and shown in (tmp_path / "out" / "report.html").read_text()


def test_a_decoder_is_tuned_on_more_images_than_calibrate(run, monkeypatch):
    """The calibration's come first; what tuning took is reported."""
    given = {}
    quantize = quantization_loop.quantize

    def noting(model, batches, *args, tune_batches, **kwargs):
        given.update(calibrate=batches.image_ids, tune=tune_batches.image_ids)
        return quantize(model, batches, *args, tune_batches=tune_batches, **kwargs)

    monkeypatch.setattr(quantization_loop, "quantize", noting)
    options = {"recipe.tune_steps": 2, "recipe.tune_units": ["mask_decoder.*"], "recipe.tune_weight_lr": 0.1}
    code, text, metrics = run(cfg_options=options | {"test_cfg.calib.num_images": 2, "test_cfg.calib.tune_images": 3})
    assert code == 0, text
    assert given["tune"][:2] == given["calibrate"] and len(given["tune"]) == 3
    assert set(metrics["stages"]) == {*STAGES, "targets", "tune"}
    assert list(metrics["stages"]) == [name for name in quantization_loop.STAGES if name in metrics["stages"]]


def test_a_detector_sees_each_image_to_calibrate_and_to_tune_once(ptq_config, tmp_path):
    cfg = read_config(str(ptq_config), {"test_cfg.calib.tune_images": 3, "test_cfg.prompts": "detector"})
    cfg.work_dir = str(tmp_path / "out")
    cfg.model = dict(type="FixedDetector", boxes=[[3.0, 4.0, 30.0, 41.0]], scores=[0.9])
    loop = Runner.from_cfg(cfg).test_loop
    model = loop.wrap(loop.runner.model)
    items, more = loop.calibration(model, tune=True)
    assert (len(items), len(more), model.detector.images) == (2, 3, 3) and more.image_ids[:2] == items.image_ids
    items, more = loop.calibration(model, tune=False)
    assert (len(items), more, model.detector.images) == (2, None, 5)


def test_images_to_tune_may_be_of_a_data_set_of_their_own(ptq_config, scenes_config, tmp_path):
    options = {"test_cfg.calib.dataset.indices": 2, "test_cfg.calib.tune_images": 1}
    options["test_cfg.calib.tune_dataset"] = dict(scenes_config, indices=[2])
    cfg = read_config(str(ptq_config), options)
    cfg.work_dir = str(tmp_path / "out")
    loop = Runner.from_cfg(cfg).test_loop
    model = loop.wrap(loop.runner.model)
    items, more = loop.calibration(model, tune=True)
    last = loop.read(model)[2].img_id
    assert len(items) == 2 and last not in items.image_ids and more.image_ids == [last]
    assert loop.calibration(model, tune=False)[1] is None


def test_wrong_data_sets_to_tune_are_refused_by_their_key(run):
    with pytest.raises(ValueError, match="^calib: `tune_dataset` must be the config of a data set, got 'photos'$"):
        ptq_loop.Calibration(tune_dataset="photos")
    code, text, _ = run(cfg_options={"test_cfg.calib.tune_dataset": dict(type="CocoDataset", ann_file="none.json")})
    assert code == 2 and "none.json" in text


def test_wrong_numbers_of_images_to_tune_are_refused_by_their_key(run):
    for number in (0, True, 2.5):
        with pytest.raises(
            ValueError, match=f"^calib: `tune_images` must be a positive integer or None, got {number}$"
        ):
            ptq_loop.Calibration(tune_images=number)
    with pytest.raises(ValueError, match="^prompts: a share of 0.5 of 1 images gives 'mask' none"):
        ptq_loop.Calibration(tune_images=1, prompts={"box": 0.5, "mask": 0.5})
    options = {"recipe.tune_steps": 2, "test_cfg.calib.num_images": 2, "test_cfg.calib.tune_images": 4}
    code, text, _ = run(cfg_options=options)
    assert code == 2 and "`tune_images` is 4, but there are only 3 calibration images" in text


def test_the_checkpoint_is_the_model_that_was_measured(run, ptq_config, tmp_path, sam_config):
    _, _, metrics = run()
    sam = load_quantized(tmp_path / "out" / "quantized.pth", lambda _: build_sam(**rename(sam_config)))
    packed = load_quantized(tmp_path / "out" / "quantized.safetensors").state_dict()
    assert all(torch.equal(value, packed[name]) for name, value in computing_state(sam).items())
    cfg = read_config(str(ptq_config))
    loader = Runner.build_dataloader(cfg.test_dataloader)
    model = BoxPromptedSAM(sam).eval()
    records = ptq_loop.read_records(loader, model, quantization_loop.Cache(None))
    found = evaluate(model, records, loader.dataset.metainfo, loader.dataset.ann_file).metrics
    assert found == {key: metrics["quantized"][key] for key in found}


def rename(sam_config):
    return dict(name_or_cfg=sam_config["name"], checkpoint=sam_config["checkpoint"])


@pytest.mark.slow
def test_six_bits_are_closer_to_floating_point_than_three(run):
    close = {bits: run(cfg_options={"recipe.w_bits": bits, "recipe.a_bits": bits})[2] for bits in (6, 3)}
    assert close[6]["quantized"]["IoU_fp"] > 0.9 > close[3]["quantized"]["IoU_fp"]
    assert close[6]["fp"] == close[3]["fp"]


def test_a_failed_audit_reports_nothing(run, monkeypatch):
    code, _, before = run()
    assert code == 0

    def fail(*args, **kwargs):
        raise AuditError(AuditReport(["blocks.0: drop mode is on"]))

    monkeypatch.setattr(quantization_loop, "quantize", fail)
    code, text, metrics = run()
    assert code == 1 and "blocks.0: drop mode is on" in text and "mIoU" not in text
    assert metrics == before, "complete results are replaced by complete ones alone"


def test_other_errors_are_not_swallowed(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quantization_loop, "quantize", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run()


def test_an_error_from_deep_in_a_run_is_not_presented_as_bad_input(run, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(quantization_loop, "quantize", fail)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run()


@pytest.mark.parametrize(
    "error", [UnitError("unit 'blocks.0' does not trace"), DataError("a.jpg is not a readable image")]
)
def test_documented_errors_from_deep_in_a_run_are_one_line(run, monkeypatch, tmp_path, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(quantization_loop, "quantize", fail)
    code, text, metrics = run()
    assert code == 2 and text.count("\n") == 1 and text.startswith(f"error: {error} (traceback in ")
    assert "Traceback" in (tmp_path / "out" / "error.txt").read_text() and metrics is None


def test_a_work_dir_is_one_runs_at_a_time(run, tmp_path):
    with locked(tmp_path / "out"):
        code, text, _ = run()
    assert code == 2 and text.count("\n") == 1 and f"{tmp_path / 'out'} is in use by process {os.getpid()} on" in text
    assert not (tmp_path / "out" / "error.txt").exists(), "that place is the other's"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EMFILE, 2)])
def test_a_full_disk_is_one_line(run, monkeypatch, number, code):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "units/004.pt")

    monkeypatch.setattr(quantization_loop, "quantize", fail)
    found, text, _ = run()
    assert found == code and text.count("\n") == 1 and os.strerror(number) in text and "--resume" in text


def test_a_unit_that_no_data_reach_is_one_line(run):
    unit = "prompt_encoder.mask_downscaling"  # SAM runs it for mask prompts only
    code, text, _ = run(cfg_options={"test_cfg.units": [unit]})
    assert code == 2 and text.count("\n") == 1 and unit in text and "has seen no data" in text


def test_bits_of_the_command_line_go_before_the_configs(run):
    _, _, metrics = run(w_bits=6, a_bits=5)
    assert metrics["bits"] == [6, 5] and metrics["recipe"] == "rtn"


def test_units_are_tried_before_many_images_are_evaluated(run, monkeypatch):
    monkeypatch.setattr(quantization_loop, "_FEW", 2)
    monkeypatch.setattr(ptq_loop, "evaluate", lambda *_: pytest.fail("the expensive part was reached"))
    code, text, _ = run(cfg_options={"test_cfg.leave": ["no.such"]})
    assert code == 2 and text.count("\n") == 1 and "`leave` entry 'no.such' matches nothing in the units" in text


def test_bad_data_found_late_is_one_line_and_a_trace_on_disk(run, tmp_path):
    code, text, _ = run(cfg_options={"test_cfg.calib.num_images": 4})
    assert code == 2 and text.count("\n") == 1 and "there are only 3 calibration images" in text
    assert "Traceback" in (tmp_path / "out" / "error.txt").read_text()


def test_the_floating_point_evaluation_is_kept_on_request(run, monkeypatch, tmp_path, scenes):
    calls = []

    def counted(model, records, metainfo, ann_file, reference, desc, workers, kinds):
        calls.append(desc)
        return evaluate(model, records, metainfo, ann_file, reference, desc, workers, kinds)

    monkeypatch.setattr(ptq_loop, "evaluate", counted)
    options = dict(cfg_options={"test_cfg.cache_dir": str(tmp_path / "cache")})
    first, second = run(**options)[2], run(recipe="rtn", **options)[2]
    assert calls == ["floating-point evaluation", *["quantized evaluation"] * 2]
    assert first["fp"] == second["fp"] and first["quantized"] == second["quantized"]
    path = scenes / "images" / "000000.png"
    path.write_bytes((scenes / "images" / "000001.png").read_bytes())
    assert run(**options)[2]["fp"] != first["fp"] and len(calls) == 5


def test_the_seed_reaches_calibration_and_reconstruction(run, monkeypatch):
    seen = []

    def spy(model, batches, recipe, **kwargs):
        seen.append((batches[0], recipe.seed))
        raise AuditError(AuditReport(["enough seen"]))

    monkeypatch.setattr(quantization_loop, "quantize", spy)
    for seed in (0, 0, 5):
        run(seed=seed)
    (a, seed_a), (b, seed_b), (c, seed_c) = seen
    assert torch.equal(a["image"], b["image"]) and torch.equal(a["boxes"], b["boxes"])
    assert (seed_a, seed_b, seed_c) == (0, 0, 5)
    assert a["boxes"].shape != c["boxes"].shape or not torch.equal(a["boxes"], c["boxes"])


def test_resume_gives_the_figures_of_the_first_run(run, tmp_path):
    options = dict(recipe="qdrop", cfg_options={"recipe.iterations": 3})
    first = run(**options)[2]
    (tmp_path / "out" / "units" / "004.pt").unlink()
    again = run(resume=True, **options)[2]
    assert again["quantized"] == first["quantized"]
    code, text, _ = run(resume=True, recipe="qdrop", cfg_options={"recipe.iterations": 4})
    assert code == 2 and "cannot resume" in text


def test_boxes_from_a_file_give_both_figures(run, tmp_path, scenes):
    rows = json.loads((scenes / "instances.json").read_text())["annotations"]
    rows = [dict(image_id=r["image_id"], category_id=1, bbox=r["bbox"], score=0.5) for r in rows]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    _, _, metrics = run(cfg_options={"test_cfg.prompts": str(tmp_path / "boxes.json")})
    for part in ("fp", "quantized"):
        assert metrics[part]["AP"] == pytest.approx(metrics[part]["AP_gt"]), "the file holds the true boxes"
    assert metrics["fp"]["AP_box"] == pytest.approx(1)


@pytest.fixture
def coco_scenes(scenes):
    """``scenes`` in COCO's folders with COCO's 80 categories."""
    path = scenes / "instances.json"
    content = json.loads(path.read_text())
    content["categories"] = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
    (scenes / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (scenes / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        (scenes / part).symlink_to(scenes / "images")
    return scenes


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_mmdet_config_becomes_a_ptq_run(coco_scenes, sam_config, tmp_path, monkeypatch, wrapped):
    """By custom_imports, sam, recipe and test_cfg alone, with mmdet's own Runner, hooks and evaluator settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco").symlink_to(coco_scenes)
    yolox = build_yolox()
    for convs in (yolox.bbox_head.multi_level_conv_cls, yolox.bbox_head.multi_level_conv_obj):
        for conv in convs:
            torch.nn.init.constant_(conv.bias, 3.0)  # sure of everything, so that there are boxes
    torch.save({"state_dict": yolox.state_dict()}, tmp_path / "yolox.pth")
    calib = dict(num_images=2, max_boxes=3)
    loop = dict(type="PTQLoop", calib=calib, max_boxes=5)
    (tmp_path / "child.py").write_text(
        "_base_ = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'\n"
        f"custom_imports = dict(imports=['ahcq_plugin.mm'])\ntest_cfg = {loop!r}\n"
        f"sam = {sam_config!r}\nrecipe = 'rtn'\n"
        "load_from = 'yolox.pth'\nwork_dir = 'out'\ntest_dataloader = dict(num_workers=0, persistent_workers=False)\n"
    )
    runner = Runner.from_cfg(Config.fromfile(tmp_path / "child.py"))
    if wrapped:
        runner.model = torch.nn.DataParallel(runner.model)
    metrics = runner.test()
    assert isinstance(runner.model, BoxPromptedSAM)
    for name, value in runner.model.detector.state_dict().items():
        assert torch.equal(value, yolox.state_dict()[name]), "the checkpoint went into the detector"
    assert all(0 < len(record["boxes"]) <= 3 for record in _batches(runner.test_loop))
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["quantized/IoU_fp"] == saved["quantized"]["IoU_fp"] < 1
    assert {"AP", "AP_gt", "mIoU", "AP_box"} <= saved["fp"].keys()


def _batches(loop):
    return list(loop.calibration(loop.runner.model, tune=False)[0])


def test_a_loop_without_recipe_says_where_it_belongs(ptq_config, tmp_path):
    cfg = read_config(str(ptq_config))
    cfg.work_dir = str(tmp_path / "out")
    recipe = cfg.pop("recipe")
    with pytest.raises(ValueError, match="give `recipe` at the top level of the config"):
        _ = Runner.from_cfg(cfg).test_loop
    cfg.recipe = recipe
    assert Runner.from_cfg(cfg).test_loop.recipe == Recipe.from_config(recipe)


@pytest.mark.parametrize("leaf", ["demo_sam_tiny_w4a4", "sam_tiny_w4a4_yolox_nano_coco"])
def test_a_dry_run_needs_no_data_and_no_weights(run, leaf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AHCQ_DATA", str(tmp_path / "absent"))
    code, text, metrics = run(ROOT / "mm_configs" / f"{leaf}.py", dry_run=True, cfg_options={"recipe.w_bits": 3})
    assert code == 0 and metrics is None, "the results of a dry run are not where real ones belong"
    assert (
        "dry run: 2 generated images" in text and "dry run: SAM's input is 128 pixels, its encoder has 2 blocks" in text
    )
    metrics = json.loads((tmp_path / "out" / "dry_run" / "metrics.json").read_text())
    assert metrics["bits"] == [3, 4] and list(metrics["stages"]) == STAGES


def test_the_tool_fails_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "ptq.py"), "absent.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert (done.returncode, done.stdout) == (2, "error: no config file absent.py\n")
    assert "Traceback" not in done.stderr
