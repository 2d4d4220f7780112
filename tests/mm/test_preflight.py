# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one line with exit code 2, before anything expensive."""

import io
import json
import os

import pytest
import torch
from mmengine.runner import Runner
from PIL import Image
from rich.console import Console

from ahcq_plugin.mm.data.images import read_rgb
from ahcq_plugin.mm.launch import build_runner, launch, read_config
from ahcq_plugin.zoo.images import check_header
from tests.mm.conftest import CONFIGS


@pytest.fixture
def complain(monkeypatch, tmp_path):
    """Launch a run that must not get as far as running; returns what it printed."""
    monkeypatch.setattr(Runner, "test", lambda *_: pytest.fail("the expensive part was reached"))

    def run(config, **options) -> str:
        out = io.StringIO()
        code = launch(str(config), work_dir=str(tmp_path / "out"), console=Console(file=out, width=80), **options)
        assert code == 2
        assert not (tmp_path / "out" / "metrics.json").exists()
        text = out.getvalue().strip()
        assert "\n" not in text and text.startswith("error: ")
        return text.removeprefix("error: ")

    return run


def write_child(path, base, text):
    path.write_text(f"_base_ = {str(base)!r}\n{text}\n")
    return path


@pytest.fixture
def detector_config(ptq_config, tmp_path):
    """A config whose boxes come from a detector."""
    model = "dict(_delete_=True, type='FixedDetector', boxes=[], scores=[])"
    text = f"model = {model}\ntest_cfg = dict(prompts='detector')\nload_from = None"
    return write_child(tmp_path / "child.py", ptq_config, text)


def test_wrong_config_path(complain, tmp_path):
    assert complain(tmp_path / "no.py") == f"no config file {tmp_path / 'no.py'}"


def test_config_that_is_not_python(complain, tmp_path):
    (tmp_path / "bad.py").write_text("recipe = dict(\n")
    assert complain(tmp_path / "bad.py").startswith(f"cannot read the config {tmp_path / 'bad.py'}: SyntaxError")


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"dry_run": True, "w_bits": 4, "seed": 1}])
@pytest.mark.parametrize(
    "text", ["model = dict(type='NoDetector')", "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'"]
)
def test_config_without_ptq_loop(complain, tmp_path, text, options):
    (tmp_path / "plain.py").write_text(text + "\n")
    assert "not a PTQ config: it needs custom_imports = dict(imports=['ahcq_plugin.mm'])" in complain(
        tmp_path / "plain.py", **options
    )


def test_a_dry_run_checks_keys_first(complain, ptq_config, tmp_path):
    child = write_child(tmp_path / "child.py", ptq_config, "sam = dict(_delete_=True, checkpoint='a.pth')")
    assert complain(child, dry_run=True) == "`sam` takes name and checkpoint, got ['checkpoint']"
    child = write_child(tmp_path / "child.py", ptq_config, "test_cfg = dict(promts='gt')")
    assert complain(child, dry_run=True).startswith("test_cfg: unknown key 'promts'")


@pytest.mark.parametrize("key", ["recipe", "sam"])
def test_a_dry_run_of_a_config_that_lacks_a_key(complain, ptq_config, key):
    text = "\n".join(line for line in ptq_config.read_text().splitlines() if not line.startswith(f"{key} = "))
    bare = ptq_config.with_name("bare.py")
    bare.write_text(text.replace(str(CONFIGS / "demo_sam_tiny_w4a4.py"), str(CONFIGS / "_base_/detectors/none.py")))
    assert complain(bare, dry_run=True) == f"the config has no `{key}`"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"toolkit": "mqb"}, "unknown toolkit 'mqb'; allowed: native, mqbench"),
        ({"recipe": "gptq"}, "unknown recipe 'gptq'; allowed: rtn, adaround, brecq, qdrop"),
        ({"cfg_options": {"recipe.iteration": 5}}, "recipe: unknown key 'iteration'; allowed: "),
        ({"cfg_options": {"recipe.w_bits": 9}}, "`w_bits` must be "),
        ({"cfg_options": {"recipe.a_bits": 1}}, "must be "),
        ({"cfg_options": {"recipes.a_bits": 4}}, "--cfg-options: unknown config key 'recipes.a_bits'; the config has "),
        ({"cfg_options": {"test_cfg.promts": "gt"}}, "test_cfg: unknown key 'promts'; allowed: calib, prompts, "),
        (
            {"cfg_options": {"test_cfg.calib.images": 5}},
            "calib: unknown key 'images'; allowed: dataset, seed, num_images, ",
        ),
        ({"cfg_options": {"test_cfg.calib.num_images": 0}}, "calib: `num_images` must be a positive integer, got 0"),
        ({"cfg_options": {"test_cfg.prompts": "detector"}}, "prompts='detector', but the config has NoDetector"),
        ({"cfg_options": {"test_cfg.prompts": "boxes.json"}}, "no detections file boxes.json: prompts must be"),
        ({"cfg_options": {"sam.size": 3}}, "`sam` takes name and checkpoint, got ['checkpoint', 'name', 'size']"),
        ({"cfg_options": {"test_cfg.sam": {"name": "vit_b"}}}, "test_cfg has `sam`: it belongs at the top level"),
        ({"cfg_options": {"test_cfg.recipe": "ahcq"}}, "test_cfg has `recipe`: it belongs at the top level"),
        ({"cfg_options": {"test_cfg.units": "blocks"}}, "`units` entry 'blocks' matches no module"),
        ({"cfg_options": {"test_cfg.units": [5]}}, "`units` takes module types, names and globs, got 5"),
        ({"w_bits": 9}, "recipe: `w_bits` must be in [2, 8], got 9"),
        ({"a_bits": 1}, "recipe: `a_bits` must be in [2, 8], got 1"),
        ({"device": "gpu"}, "unknown device 'gpu': give cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device 'mps' is none that runs were tried on: give cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device 'meta' is none that runs were tried on: give cpu, cuda or cuda:N"),
        ({"cfg_options": {"test_cfg.resume": "maybe"}}, "test_cfg: `resume` must be True or False, got 'maybe'"),
        ({"cfg_options": {"test_cfg.max_boxes": -3}}, "test_cfg: `max_boxes` must be a positive integer, got -3"),
        ({"cfg_options": {"test_cfg.box_chunk": True}}, "test_cfg: `box_chunk` must be a positive integer, got True"),
        (
            {"cfg_options": {"test_cfg.score_thr": float("nan")}},
            "test_cfg: `score_thr` must be a number from 0 to 1, got nan",
        ),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: this machine has "),
        ({"cfg_options": {"test_dataloader.dataset.typ": "x"}}, "the config does not build ("),
        ({"cfg_options": {"test_dataloader.batch_size": 0}}, "test_dataloader: `batch_size` must be a whole number"),
        ({"cfg_options": {"test_dataloader.sampler": 5}}, "test_dataloader: `sampler` must be a dict, got 5"),
        (
            {"cfg_options": {"test_dataloader.dataset.pipeline": [5]}},
            "test_dataloader.dataset: `pipeline` must be a list",
        ),
        (
            {"cfg_options": {"test_dataloader.dataset.ann_file": 5}},
            "test_dataloader.dataset: `ann_file` must be a text",
        ),
        (
            {"cfg_options": {"test_evaluator.type": "NoSuch"}},
            "test_evaluator must be a dict with the `type` of a metric",
        ),
        ({"cfg_options": {"test_cfg.cache_dir": 5}}, "test_cfg: `cache_dir` must be a folder or None, got 5"),
        ({"cfg_options": {"test_cfg.units": []}}, "test_cfg: `units` is empty"),
        ({"cfg_options": {"recipe.cag": True, "recipe.cag_groups": 9999}}, "recipe: `cag_groups` is 9999, the widest"),
    ],
)
def test_options(complain, ptq_config, options, message):
    assert message in complain(ptq_config, **options)


def test_an_empty_work_dir(ptq_config):
    out = io.StringIO()
    assert (
        launch(str(ptq_config), work_dir="", console=Console(file=out)) == 2 and "work dir is empty" in out.getvalue()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("raise MemoryError('too much')", "MemoryError: too much"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("_base_ = './bad.py'", "cannot read the config"),
    ],
)
def test_a_config_that_does_something_else(complain, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text + "\n")
    found = complain(tmp_path / "bad.py")
    assert found.startswith(f"cannot read the config {tmp_path / 'bad.py'}: ") and message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test_cfg = ['PTQLoop']", "the config's `test_cfg` must be a dict, got ['PTQLoop']"),
        ("test_cfg = 'PTQLoop'", "the config's `test_cfg` must be a dict, got 'PTQLoop'"),
        ("recipe = 4", "the config's `recipe` must be a dict, got 4"),
        ("sam = 'vit_b'", "the config's `sam` must be a dict, got 'vit_b'"),
        ("model = [1]", "the config's `model` must be a dict, got [1]"),
        ("load_from = 5", "the config's `load_from` must be text, got 5"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"dry_run": True, "seed": 1}])
def test_keys_of_a_wrong_type(complain, tmp_path, text, message, options):
    (tmp_path / "bad.py").write_text(f"custom_imports = dict(imports=['ahcq_plugin.mm'])\n{text}\n")
    assert complain(tmp_path / "bad.py", **options) == message


def test_a_work_dir_that_cannot_be(ptq_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "test", lambda *_: pytest.fail("the expensive part was reached"))
    (tmp_path / "file").write_text("mine")
    for name, reason in (
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
    ):
        out = io.StringIO()
        code = launch(str(ptq_config), work_dir=str(tmp_path / name), console=Console(file=out, width=80))
        text = out.getvalue()
        assert code == 2 and text.count("\n") == 1 and text.startswith("error: the work dir ") and reason in text
    assert (tmp_path / "file").read_text() == "mine"


def test_misspelt_key_in_a_config(complain, ptq_config, tmp_path):
    child = write_child(tmp_path / "child.py", ptq_config, "recpie = dict(w_bits=8)")
    assert complain(child) == "unknown config key 'recpie': did you mean 'recipe'?"


def test_missing_sam_checkpoint(complain, ptq_config, tmp_path):
    text = complain(ptq_config, cfg_options={"sam.checkpoint": "gone.pth"})
    assert text == "no weight file gone.pth"
    child = write_child(tmp_path / "b.py", ptq_config, "sam = dict(_delete_=True, name='vit_b', checkpoint='gone.pth')")
    text = complain(child)
    assert "gone.pth" in text and "https://" in text and "--dry-run" in text


def test_corrupt_sam_checkpoint(complain, ptq_config, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    text = complain(ptq_config, cfg_options={"sam.checkpoint": str(tmp_path / "bad.pth")})
    assert text.startswith(f"checkpoint {tmp_path / 'bad.pth'} cannot be read (it begins with b'not a ch'")


def test_sam_checkpoint_of_another_shape(complain, ptq_config, tiny_sam, tmp_path):
    state = tiny_sam.state_dict()
    state["image_encoder.pos_embed"] = state["image_encoder.pos_embed"][:, :4]
    torch.save(state, tmp_path / "other.pth")
    text = complain(ptq_config, cfg_options={"sam.checkpoint": str(tmp_path / "other.pth")})
    assert "does not fit the model" in text and "image_encoder.pos_embed has shape (1, 4, 8, 32)" in text


def test_missing_data(complain, ptq_config, scenes, tmp_path):
    hint = write_child(tmp_path / "child.py", ptq_config, "data_source = 'get it from example.org'")
    (scenes / "images").rename(scenes / "pictures")
    assert complain(hint) == f"no image folder {scenes}/images/: get it from example.org; --dry-run runs without it"
    (scenes / "instances.json").unlink()
    missing = f"no annotation file {scenes}/instances.json"
    assert complain(hint) == f"{missing}: get it from example.org; --dry-run runs without it"
    assert complain(ptq_config) == f"{missing}; --dry-run runs without it"


def test_bad_annotations(complain, ptq_config, scenes):
    path = scenes / "instances.json"
    content = json.loads(path.read_text())

    def complaint(**changes):
        path.write_text(json.dumps(content | changes))
        return complain(ptq_config)

    assert complaint(annotations=[]) == f"{path} has no annotations"
    assert complaint(images=[]) == f"{path} has no images"
    bare = [{k: v for k, v in row.items() if k != "segmentation"} for row in content["annotations"]]
    assert f"{len(bare)} annotations have no segmentation (first id 1)" in complaint(annotations=bare)
    gone = [{**content["images"][0], "file_name": "gone.png"}]
    assert complaint(images=gone) == f"{path} lists {scenes}/images/gone.png, which is not there"
    path.write_text("[]")
    assert complain(ptq_config).startswith(f"{path} is not in COCO format")
    path.write_text("")
    assert complain(ptq_config).startswith(f"{path} is not JSON")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("images", {"id": 1}, "images[1] has the id 1 of another row"),
        ("images", {"id": [1]}, "images[1] has id [1], expected a whole number or a name"),
        ("images", {"file_name": None}, "images[1] has file_name None, expected a name"),
        ("images", {"height": 64.5}, "images[1] has height 64.5, expected a whole number of pixels from 1 on"),
        ("images", {"width": 0}, "images[1] has width 0, expected a whole number of pixels from 1 on"),
        ("annotations", {"id": 1}, "annotations[1] has the id 1 of another row"),
        ("annotations", {"bbox": [1, 2, float("nan"), 3]}, "annotations[1] has bbox [1, 2, nan, 3], expected x, y, "),
        ("annotations", {"bbox": [1, 2, 3]}, "annotations[1] has bbox [1, 2, 3], expected x, y, width, height: four"),
        ("annotations", {"bbox": "1 2 3 4"}, "annotations[1] has bbox '1 2 3 4', expected x, y, width, height: four"),
        ("annotations", {"area": float("inf")}, "annotations[1] has area inf, expected a finite number"),
        ("annotations", {"image_id": 99}, "annotation 2 has the unknown image_id 99"),
        ("annotations", {"category_id": 99}, "annotation 2 has the unknown category_id 99"),
        ("annotations", {"segmentation": [[1e12] * 8]}, "the segmentation of annotation 2 cannot be used: a polygon"),
        ("annotations", {"segmentation": {"size": [64, 64], "counts": [5]}}, "the image has 4096 pixels"),
        ("annotations", {"segmentation": "abc"}, "it is neither polygons nor run lengths"),
        ("categories", {"name": 5}, "categories[0] has name 5, expected a name"),
    ],
)
def test_rows_of_annotations(complain, ptq_config, scenes, part, changes, message):
    path = scenes / "instances.json"
    content = json.loads(path.read_text())
    content[part][min(1, len(content[part]) - 1)].update(changes)
    path.write_text(json.dumps(content))
    text = complain(ptq_config)
    assert text.startswith(f"{path}: ") and message in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "all"}, "images must be a list, got str"),
        ({"images": ["000000.png"]}, "images[0] must be an object, got '000000.png'"),
        ({"annotations": [["a"]]}, "annotations[0] must be an object, got ['a']"),
        ({"images": [{"id": 1, "height": 64, "width": 64}]}, "images[0] has no file_name"),
        ({"annotations": [{"id": 1}]}, "annotations[0] has no image_id"),
    ],
)
def test_rows_that_are_none(complain, ptq_config, scenes, changes, message):
    path = scenes / "instances.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert complain(ptq_config) == f"{path}: {message}"


def test_an_empty_image(complain, ptq_config, scenes):
    (scenes / "images" / "000002.png").write_bytes(b"")
    assert complain(ptq_config) == f"{scenes}/instances.json lists {scenes}/images/000002.png, which is empty"
    (scenes / "images" / "000001.png").unlink()
    assert complain(ptq_config) == f"{scenes}/instances.json lists {scenes}/images/000001.png, which is not there"


def test_images_whose_headers_are_wrong(complain, ptq_config, scenes):
    path = scenes / "images" / "000002.png"
    content = path.read_bytes()
    path.write_bytes(b"<html>no such page</html>")
    assert complain(ptq_config) == f"{path} is not a readable image"
    Image.new("RGB", (64, 32)).save(path)
    assert complain(ptq_config) == f"{path} has (32, 64) pixels (H, W), its annotation says (64, 64)"
    path.write_bytes(content[:20])
    assert complain(ptq_config).startswith(f"{path} is not a readable image")


def test_a_turned_image_has_the_size_that_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.new("RGB", (64, 32)).save(tmp_path / "x.jpg", exif=exif)
    check_header(tmp_path / "x.jpg", (64, 32))
    assert read_rgb(tmp_path / "x.jpg").shape == (64, 32, 3)
    with pytest.raises(ValueError, match=r"has \(64, 32\) pixels"):
        check_header(tmp_path / "x.jpg", (32, 64))


def test_bad_detections_file(complain, ptq_config, tmp_path):
    path = tmp_path / "boxes.json"
    options = dict(cfg_options={"test_cfg.prompts": str(path)})
    for text, message in (
        ("{", "is not JSON"),
        ("{}", "is not in COCO results format: expected a list of objects with bbox, category_id, image_id, score"),
        ("[]", "holds no detections"),
    ):
        path.write_text(text)
        assert complain(ptq_config, **options).startswith(f"{path} {message}")


def test_detector_checkpoint(complain, detector_config, tmp_path):
    child, path = detector_config, tmp_path / "detector.pth"
    options = dict(cfg_options={"load_from": str(path)})
    assert (
        complain(child) == "`load_from` is not set: the detector would have random weights; --dry-run runs without it"
    )
    assert complain(child, **options) == f"no detector checkpoint {path}; --dry-run runs without it"
    published = tmp_path / "hdetr_swin_t.pth"
    text = complain(child, cfg_options={"load_from": str(published)})
    assert text.startswith(
        f"no detector checkpoint {published}: python tools/fetch_weights.py hdetr_swin_t makes it of "
    )
    assert "https://" in text and text.endswith("; --dry-run runs without it")
    path.write_bytes(b"garbage")
    assert complain(child, **options).startswith(f"checkpoint {path} cannot be read (it begins with b'garbage'")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    assert complain(child, **options).endswith(
        "does not fit the detector: 1 of 1 tensors differ, first: weight has shape (2,), the model (1,)"
    )
    torch.save({"weights": torch.zeros(1)}, path)
    assert complain(child, **options).endswith("1 of 1 tensors differ, first: weight is missing")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
def test_a_detector_checkpoint_cannot_run_code(complain, detector_config, tmp_path, zipped):
    path, marker = tmp_path / "planted.pth", tmp_path / "it_ran"
    content = {"state_dict": {"weight": torch.zeros(1)}, "meta": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    text = complain(detector_config, cfg_options={"load_from": str(path)})
    assert "system" in text and "malicious" in text and not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload works, where it is unpickled"


def test_a_detector_in_the_format_before_zip_is_read(detector_config, tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"state_dict": {"module.weight": torch.tensor([3.0])}}, path, _use_new_zipfile_serialization=False)
    cfg = read_config(str(detector_config), {"load_from": str(path)})
    cfg.work_dir = str(tmp_path / "out")
    runner = build_runner(cfg, dry_run=False, console=Console(quiet=True))
    assert float(runner.model.weight) == 3 and runner.cfg.load_from == str(path) and runner._load_from is None


def test_a_sam_with_nan_is_refused(complain, ptq_config, sam_config):
    state = torch.load(sam_config["checkpoint"], weights_only=True)
    state["image_encoder.neck.0.weight"][0, 0] = float("nan")
    torch.save(state, sam_config["checkpoint"])
    text = complain(ptq_config)
    assert text.startswith("the SAM holds NaN or infinite values in 1 tensors, first image_encoder.neck.0.weight")
