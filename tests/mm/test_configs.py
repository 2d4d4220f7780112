# SPDX-License-Identifier: Apache-2.0
import difflib
import inspect
import itertools
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config

from ahcq_plugin.mm.data.wrappers import innermost
from ahcq_plugin.mm.dry_run import make_dry_run
from ahcq_plugin.mm.launch import read_config
from ahcq_plugin.mm.preflight import KNOWN_KEYS, check_keys
from ahcq_plugin.mm.ptq_loop import PTQLoop
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.zoo.published import of_path
from ahcq_plugin.zoo.sam import CHECKPOINTS, build_sam

ROOT = Path(__file__).resolve().parents[2]
LEAVES = sorted((ROOT / "mm_configs").glob("*.py"))
PUBLISHED = [leaf for leaf in LEAVES if re.match(r"sam_[blh]_", leaf.stem)]
VIDEO = [leaf for leaf in LEAVES if re.match(r"sam2_(t|s|bp)_", leaf.stem)]


def _classes(detector):
    head = detector.roi_head.bbox_head if hasattr(detector, "roi_head") else detector.bbox_head
    return head.num_classes


def test_leaves_and_tools_are_short():
    long = [path.name for path in LEAVES if len(path.read_text().splitlines()) > 60]
    assert LEAVES and not long


@pytest.mark.parametrize("leaf", PUBLISHED + VIDEO, ids=lambda path: path.stem)
def test_a_published_leaf_names_only_what_differs(leaf):
    lines = leaf.read_text().splitlines()
    assert len(lines) <= 4 and not any(line.startswith(("test_cfg", "sam", "model")) for line in lines)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.stem)
def test_every_leaf_says_what_its_name_says(leaf):
    cfg = read_config(str(leaf))
    check_keys(cfg)
    recipe = Recipe.from_config(cfg.recipe)
    w_bits, a_bits = map(int, re.search(r"_w(\d)a(\d)", leaf.stem).groups())
    named = "ahcq_plus" if leaf.stem.endswith("_tuned") else "ahcq"
    assert (recipe.name, recipe.w_bits, recipe.a_bits) == (named, w_bits, a_bits)
    name = leaf.stem.split("_w")[0].removeprefix("demo_")
    size = re.search(r"^sam_([blh])$", name)
    assert cfg.sam.name == (f"vit_{size[1]}" if size else name)
    assert not size or CHECKPOINTS[cfg.sam.name].file == Path(cfg.sam.checkpoint).name
    assert cfg.test_cfg.type == ("VideoPTQLoop" if "sam2" in leaf.stem else "PTQLoop")
    detectors = {"yolox": "YOLOX", "frcnn": "FasterRCNN", "hdetr": "HDeformableDETR", "dino": "DINO"}
    assert cfg.model.type == next((d for part, d in detectors.items() if part in leaf.stem), "NoDetector")
    assert cfg.test_dataloader.dataset != cfg.test_cfg.calib.get("dataset"), "calibration images are others"


def test_there_is_a_leaf_for_every_cell_of_the_published_tables():
    cells = itertools.product("blh", (4, 5, 6), ("frcnn", "yolox", "hdetr", "dino"))
    assert {f"sam_{sam}_w{bits}a{bits}_{detector}" for sam, bits, detector in cells} <= {leaf.stem for leaf in LEAVES}


@pytest.mark.parametrize("leaf", PUBLISHED, ids=lambda path: path.stem)
def test_a_leaf_has_the_published_setting(leaf):
    cfg = read_config(str(leaf))
    assert cfg.recipe.iterations == 20000 and cfg.test_cfg.calib.num_images == 32
    assert cfg.test_dataloader.dataset.ann_file == "annotations/instances_val2017.json"
    assert innermost(cfg.train_dataloader.dataset).ann_file == "annotations/instances_train2017.json"
    limit = inspect.signature(PTQLoop).parameters["max_boxes"].default
    if cfg.model.type in ("HDeformableDETR", "DINO"):
        assert (
            cfg.test_cfg.score_thr == 0
            and cfg.test_cfg.get("max_boxes", limit) == cfg.model.test_cfg.max_per_img == 100
        )
    else:
        thresholds = cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg)
        assert cfg.test_cfg.score_thr == thresholds.score_thr == 0.05


@pytest.mark.parametrize(
    "base", sorted((ROOT / "mm_configs/_base_/detectors").glob("*.py")), ids=lambda path: path.stem
)
def test_every_detector_builds_and_says_where_its_weights_are_to_be_had(base):
    cfg = Config.fromfile(base)
    detector = MODELS.build(cfg.model)
    if cfg.model.type == "NoDetector":
        return
    # the labels of the detector are those of the data set
    assert _classes(detector) == len(CocoDataset.METAINFO["classes"])
    file = Path(cfg.load_from).name
    assert cfg.load_from == f"checkpoints/{file}" and of_path(file) is not None
    # the loop's settings came with it, and only in their place
    assert cfg.test_cfg.type == "PTQLoop" and "ptq_loop" not in cfg


@pytest.mark.parametrize("size", "blh")
def test_a_dry_run_cuts_depth_inputs_and_the_width_of_the_larger_two(size, tmp_path):
    cfg = read_config(str(ROOT / "mm_configs" / f"sam_{size}_w4a4_frcnn.py"))
    cfg.work_dir = str(tmp_path)
    notes = make_dry_run(cfg)
    name = cfg.sam.name
    cut = f"{name.image_size} pixels, its encoder has {name.depth} blocks of width {name.embed_dim} with"
    assert any(cut in note for note in notes)
    assert any("detector's input is 256 pixels" in note for note in notes)
    scales = [step.scale for step in cfg.test_dataloader.dataset.pipeline if "scale" in step]
    assert scales == [(256, 256)]
    with torch.device("meta"):
        small, full = (build_sam(model, checkpoint=False) for model in (dict(name), f"vit_{size}"))
    width = 1 if size == "b" else 4
    blocks = [model.image_encoder.blocks[0] for model in (small, full)]
    assert blocks[0].attn.qkv.in_features * width == blocks[1].attn.qkv.in_features
    assert blocks[0].attn.num_heads * width == blocks[1].attn.num_heads
    shapes = {name: p.shape for name, p in full.mask_decoder.named_parameters()}
    assert shapes == {name: p.shape for name, p in small.mask_decoder.named_parameters()}
    # a block with windows and a global one
    assert [block.window_size for block in small.image_encoder.blocks] == [14, 0]


def test_a_dry_run_tunes_for_a_few_steps_only_and_only_where_the_config_does(tmp_path):
    found = {}
    for steps in (0, 300):
        cfg = read_config(str(ROOT / "mm_configs" / "demo_sam_tiny_w4a4.py"))
        cfg.work_dir, cfg.recipe["tune_steps"] = str(tmp_path), steps
        make_dry_run(cfg)
        found[steps] = cfg.recipe["tune_steps"]
    assert found == {0: 0, 300: cfg.recipe["iterations"]}


def test_no_key_of_mmdets_own_configs_is_taken_for_a_typing_error():
    keys = set()
    for path in (Path(mmdet.__file__).parent / ".mim" / "configs").rglob("*.py"):
        keys.update(re.findall(r"^([A-Za-z_]\w*)\s*=", path.read_text(), re.MULTILINE))
    assert len(keys) > 100
    assert not [k for k in keys - set(KNOWN_KEYS) if difflib.get_close_matches(k, KNOWN_KEYS, n=1, cutoff=0.8)]
