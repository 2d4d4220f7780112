# SPDX-License-Identifier: Apache-2.0
"""A config cut down to random weights, two generated images and a few iterations: does every stage run?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from ahcq_plugin.mm.files import write_json
from ahcq_plugin.mm.records import leaf_config
from ahcq_plugin.zoo.sam import packaged_config
from ahcq_plugin.zoo.scenes import write_coco

IMAGES, IMAGE_SIZE, BOXES, ITERATIONS = 2, 64, 2, 2
#: SAM's input in a dry run; a ViT-B at 1024 pixels would take minutes per image on a CPU.
INPUT_SIZE = 128
#: Of the published encoders: width, depth, heads, blocks with global attention.
_PUBLISHED = {
    "vit_b": (768, 12, 12, [2, 5, 8, 11]),
    "vit_l": (1024, 24, 16, [5, 11, 17, 23]),
    "vit_h": (1280, 32, 16, [7, 15, 23, 31]),
}


def make_dry_run(cfg: Config) -> list[str]:
    """Cut ``cfg`` down, in place; outputs go to ``<work_dir>/dry_run``.

    Returns: what was replaced, one line each.
    """
    cfg.work_dir = str(Path(cfg.work_dir) / "dry_run")
    cfg.load_from = None
    cfg.sam = dict(name=small_sam(cfg.sam["name"]), checkpoint=False)
    cfg.recipe["iterations"] = ITERATIONS
    dataset = _scenes(cfg.test_dataloader.dataset, Path(cfg.work_dir))
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.test_dataloader["dataset"] = dataset  # update() would merge it with the old one
    loop = cfg.test_cfg
    if loop.get("prompts", "detector") != "detector":
        loop.prompts = "gt"  # a file of detections knows other images
    seed = (loop.get("calib") or {}).get("seed", 0)
    # A detector with random weights may find nothing, and calibration needs boxes.
    loop["calib"] = dict(dataset=dataset, num_images=IMAGES, max_boxes=BOXES, prompts="gt", seed=seed)
    loop.update(score_thr=0.0, max_boxes=BOXES, cache_dir=None)
    _let_everything_pass(cfg.model)
    return [
        f"{IMAGES} generated images of {IMAGE_SIZE} pixels, {ITERATIONS} iterations a unit, random weights",
        f"SAM's input is {cfg.sam['name']['image_size']} pixels",
    ]


def small_sam(name: str | Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``build_sam``: full width and depth, input of at most :data:`INPUT_SIZE` pixels."""
    config = packaged_config() if isinstance(name, str) else dict(name)
    if name in _PUBLISHED:
        width, depth, heads, global_blocks = _PUBLISHED[name]
        config.update(patch_size=16, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4, window_size=14)
        config.update(global_attn_indexes=global_blocks, prompt_embed_dim=256, mask_in_chans=16, transformer_depth=2)
        config.update(transformer_heads=8, transformer_mlp_dim=2048, iou_head_depth=3, iou_head_hidden_dim=256)
    config["image_size"] = min(config["image_size"], INPUT_SIZE)
    return config


def _scenes(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Data set of generated images with the classes of the configured one, under its pipeline."""
    config = leaf_config(config)
    ann_file = write_coco(folder / "scenes", IMAGES, size=IMAGE_SIZE)
    kind = DATASETS.get(config["type"])
    classes: Sequence[str] = (config.get("metainfo") or kind.METAINFO)["classes"]
    content = json.loads(ann_file.read_text(encoding="utf-8"))
    content["categories"] = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    write_json(content, folder / "instances.json", indent=None)
    return dict(
        type="CocoDataset",
        ann_file=str((folder / "instances.json").resolve()),
        data_prefix=dict(img=str(ann_file.resolve().parent / "images")),
        metainfo=dict(classes=tuple(classes)),
        test_mode=True,
        pipeline=config["pipeline"],
    )


def _let_everything_pass(config: Any) -> None:
    """No score threshold and few boxes in a detector's config: random weights give scores near 0."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "score_thr":
                config[key] = 0.0
            elif key == "max_per_img":
                config[key] = BOXES
            else:
                _let_everything_pass(value)
    elif isinstance(config, (list, tuple)):
        for item in config:
            _let_everything_pass(item)
