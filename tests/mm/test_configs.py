# SPDX-License-Identifier: Apache-2.0
import difflib
import re
from pathlib import Path

import mmdet
import pytest

from ahcq_plugin.mm.dry_run import make_dry_run
from ahcq_plugin.mm.launch import read_config
from ahcq_plugin.mm.preflight import KNOWN_KEYS, check_keys
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.zoo.sam import build_sam

ROOT = Path(__file__).resolve().parents[2]
LEAVES = sorted((ROOT / "mm_configs").glob("*.py"))


def test_leaves_and_tools_are_short():
    long = [path.name for path in LEAVES if len(path.read_text().splitlines()) > 60]
    assert LEAVES and not long


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.stem)
def test_every_leaf_says_what_its_name_says(leaf):
    cfg = read_config(str(leaf))
    check_keys(cfg)
    recipe = Recipe.from_config(cfg.recipe)
    w_bits, a_bits = map(int, re.search(r"_w(\d)a(\d)", leaf.stem).groups())
    assert (recipe.name, recipe.w_bits, recipe.a_bits) == ("ahcq", w_bits, a_bits)
    assert cfg.sam.name == ("vit_b" if leaf.stem.startswith("sam_b") else "sam_tiny")
    detectors = {"yolox": "YOLOX", "frcnn": "FasterRCNN"}
    assert cfg.model.type == next((d for part, d in detectors.items() if part in leaf.stem), "NoDetector")
    assert cfg.test_dataloader.dataset != cfg.test_cfg.calib.get("dataset"), "calibration images are others"


def test_the_sam_b_run_is_the_published_setting():
    cfg = read_config(str(ROOT / "mm_configs" / "sam_b_w4a4_frcnn.py"))
    assert cfg.recipe.iterations == 20000 and cfg.test_cfg.calib.num_images == 32
    assert cfg.test_dataloader.dataset.ann_file == "annotations/instances_val2017.json"
    assert cfg.train_dataloader.dataset.ann_file == "annotations/instances_train2017.json"
    assert cfg.test_cfg.score_thr == cfg.model.test_cfg.rcnn.score_thr == 0.05


def test_a_dry_run_of_sam_b_keeps_its_size_but_the_input(tmp_path):
    cfg = read_config(str(ROOT / "mm_configs" / "sam_b_w4a4_frcnn.py"))
    cfg.work_dir = str(tmp_path)
    notes = make_dry_run(cfg)
    assert any(f"{cfg.sam.name.image_size} pixels" in note for note in notes)
    small, full = build_sam(dict(cfg.sam.name), checkpoint=False), build_sam("vit_b", checkpoint=False)
    shapes = {name: p.shape for name, p in full.named_parameters()}
    differing = {name for name, p in small.named_parameters() if shapes.pop(name) != p.shape}
    assert not shapes and all("pos_embed" in name or "rel_pos" in name for name in differing)


def test_no_key_of_mmdets_own_configs_is_taken_for_a_typing_error():
    keys = set()
    for path in (Path(mmdet.__file__).parent / ".mim" / "configs").rglob("*.py"):
        keys.update(re.findall(r"^([A-Za-z_]\w*)\s*=", path.read_text(), re.MULTILINE))
    assert len(keys) > 100
    assert not [k for k in keys - set(KNOWN_KEYS) if difflib.get_close_matches(k, KNOWN_KEYS, n=1, cutoff=0.8)]
