# SPDX-License-Identifier: Apache-2.0
"""A config cut down to random weights, two generated images and a few iterations: does every stage run?"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from ahcq_plugin.mm.data.wrappers import innermost
from ahcq_plugin.mm.preflight import loop_class
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.support.files import write_json
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.hugging_face import PREFIX
from ahcq_plugin.zoo.relatives import RELATIVES
from ahcq_plugin.zoo.sam import build_sam, check_name
from ahcq_plugin.zoo.scenes import write_coco

IMAGES, FRAMES, IMAGE_SIZE, BOXES, ITERATIONS = 2, 4, 64, 2, 1
#: SAM's and the detector's input in a dry run; a ViT-B at 1024 pixels would take minutes per image on a CPU.
INPUT_SIZE, DETECTOR_INPUT_SIZE = 128, 256
#: Blocks of SAM's encoder: one with windows and one with global attention.
DEPTH = 2
#: Width and heads of the published encoders; a quarter of them for the larger two, whose singular values take long.
_PUBLISHED = {"vit_b": (768, 12), "vit_l": (256, 4), "vit_h": (320, 4)}


def make_dry_run(cfg: Config) -> list[str]:
    """Cut ``cfg``, whose keys are checked, down in place; outputs go to ``<work_dir>/dry_run``.

    Returns: what was replaced, one line each.
    """
    cfg.work_dir = str(Path(cfg.work_dir) / "dry_run")
    cfg.load_from = None
    cfg.recipe["iterations"] = ITERATIONS
    for steps in ("tune_steps", "tune_feature_steps"):
        if getattr(Recipe.from_config(cfg.recipe), steps):
            cfg.recipe[steps] = ITERATIONS
    cfg.test_cfg["cache_dir"] = None
    return loop_class(cfg).cut_down(cfg)


@torch.no_grad()
def initialise(detector: nn.Module) -> None:
    """What a newly built detector without a checkpoint lacks to find boxes, in place.

    DETRs' level embeddings are what the memory held, until ``init_weights`` (which would load the backbone's published
    weights). The weights of convolutions are halved: as drawn, those of deep detectors give infinite boxes.
    """
    for name, parameter in detector.named_parameters():
        if name.endswith("level_embed"):
            parameter.normal_()
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(0.5)


def small_sam2(name: str | Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``build_sam2``: full width and depth, input of at most :data:`INPUT_SIZE` pixels."""
    if name == "sam2_tiny":
        name = packaged_config(name)
    config = {"name": name} if isinstance(name, str) else dict(name)
    return config | {"image_size": min(config.get("image_size", INPUT_SIZE), INPUT_SIZE)}


def small_sam(name: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of ``build_sam``: at most :data:`DEPTH` blocks and :data:`INPUT_SIZE` pixels of input; None for a model
    of another package, which nothing here can cut down: whether that one runs is the question."""
    check_name(name)
    if isinstance(name, str) and (name in RELATIVES or name.startswith(PREFIX)):
        return None
    config = packaged_config() if isinstance(name, str) else dict(name)
    if name in _PUBLISHED:
        width, heads = _PUBLISHED[name]
        config.update(patch_size=16, embed_dim=width, num_heads=heads, mlp_ratio=4, window_size=14)
        config.update(prompt_embed_dim=256, mask_in_chans=16, transformer_depth=2)
        config.update(transformer_heads=8, transformer_mlp_dim=2048, iou_head_depth=3, iou_head_hidden_dim=256)
    config["image_size"] = min(config["image_size"], INPUT_SIZE)
    if config["depth"] > DEPTH:
        config.update(depth=DEPTH, global_attn_indexes=[DEPTH - 1])
    return config


def drop_lost(cfg: Config, name: str | Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    """Take what names modules of the config's SAM that the small one lacks out of ``units``, ``leave``, ``without`` and
    ``tune_units``, in place: it is right, and would be refused. Returns: the entries."""
    lists = [(cfg.test_cfg, "units"), (cfg.test_cfg, "leave"), (cfg.recipe, "tune_units")]
    lists += [(without, key) for without in [cfg.recipe.get("without") or {}] for key in without]
    given = [(part, key) for part, key in lists if part.get(key) and isinstance(part[key], (list, tuple))]
    if not given:
        return []
    with torch.device("meta"):
        whole, left = (
            [module for module, _ in build_sam(dict(sam) if isinstance(sam, Mapping) else sam, False).named_modules()]
            for sam in (name, small)
        )
    lost = []
    for part, key in given:
        for entry in [entry for entry in part[key] if isinstance(entry, str)]:
            if fnmatch.filter(whole, entry) and not fnmatch.filter(left, entry):
                lost.append(entry)
        kept = [entry for entry in part[key] if entry not in lost]
        part[key] = None if key == "units" and not kept else kept  # all units, where none of those is there
    return lost


def scenes(config: Mapping[str, Any], folder: Path, count: int = IMAGES) -> dict[str, Any]:
    """Data set of ``count`` generated images with the classes of the configured one, under its pipeline."""
    config = innermost(config)
    kind = DATASETS.get(config["type"])
    if kind is None:
        raise ValueError(f"unknown data set {config['type']!r}: its module belongs into custom_imports")
    ann_file = write_coco(folder / "scenes", count, size=IMAGE_SIZE)
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


def shrink_inputs(pipeline: Sequence[dict[str, Any]]) -> bool:
    """Images are resized to :data:`DETECTOR_INPUT_SIZE` at most, in place; False when nothing was larger."""
    large = [step for step in pipeline if np.max(step.get("scale") or 0) > DETECTOR_INPUT_SIZE]
    for step in large:
        step["scale"] = (DETECTOR_INPUT_SIZE, DETECTOR_INPUT_SIZE)
    return bool(large)


def let_everything_pass(config: Any) -> None:
    """No score threshold and few boxes in a detector's config: random weights give scores near 0."""
    if isinstance(config, MutableMapping):
        for key, value in config.items():
            if key == "score_thr":
                config[key] = 0.0
            elif key == "max_per_img":
                config[key] = BOXES
            else:
                let_everything_pass(value)
    elif isinstance(config, (list, tuple)):
        for item in config:
            let_everything_pass(item)
