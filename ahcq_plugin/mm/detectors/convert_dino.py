# SPDX-License-Identifier: Apache-2.0
"""Official DINO checkpoints with a FocalNet backbone to state dicts of MMDetection's DINO with ``TimmFocalNet``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import ahcq_plugin.mm.detectors.focalnet  # noqa: F401  registers the backbone
from ahcq_plugin.mm.detectors import convert_hdetr
from ahcq_plugin.mm.detectors.official import COCO_IDS, ROWS, read_checkpoint, renamed, shared_with, write_converted
from ahcq_plugin.support.batches import blaming

OFFICIAL = "DINO (FocalNet)"
_BACKBONE = "backbone.0."
#: Levels that come from the backbone; one more is made from the last.
_LEVELS = 4
_HEADS = 6  # decoder layers; the encoder's head comes after theirs
_RULES = (
    (r"transformer\.tgt_embed\.", "query_embedding."),
    (r"label_enc\.", "dn_query_generator.label_embedding."),
    (r"transformer\.decoder\.(ref_point_head|norm)\.", r"decoder.\1."),
    (r"transformer\.enc_out_class_embed\.", f"bbox_head.cls_branches.{_HEADS}."),
    (
        r"transformer\.enc_out_bbox_embed\.layers\.(\d+)\.",
        lambda m: f"bbox_head.reg_branches.{_HEADS}.{2 * int(m[1])}.",
    ),
    (r"input_proj\.(\d+)\.([01])\.", lambda m: f"neck.{_neck(int(m[1]))}.{('conv', 'gn')[int(m[2])]}."),
)
_BACKBONE_RULES = (
    (r"patch_embed\.", "stem."),
    (r"layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."),  # timm's begin a stage
    (r"(layers\.\d+\.blocks\.\d+\.)norm([12])\.", r"\1norm\2_post."),
    (r"(layers\.\d+\.blocks\.\d+\.)gamma_([12])", r"\1ls\2.gamma"),
    (r"norm(\d)\.", r"norms.\1."),
)
#: Linear layers there, 1 x 1 convolutions in timm.
_POINTWISE = re.compile(r"layers\.\d+\.blocks\.\d+\.(modulation\.(f|proj)|mlp\.fc[12])\.weight")


def new_name(name: str) -> str:
    """Our name of an official parameter.

    Raises:
        ValueError: no such parameter in DINO.
    """
    if name.startswith(_BACKBONE):
        own = name.removeprefix(_BACKBONE)
        return f"backbone.{renamed(own, _BACKBONE_RULES) or own}"
    new = renamed(name, _RULES) or renamed(name, convert_hdetr.RULES)
    if new is None:
        raise ValueError(f"unknown parameter {name!r}: not an official {OFFICIAL} checkpoint")
    return new


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the official one.

    All classifiers keep the rows of COCO's 80 categories. The encoder's takes the highest of them as the score of a
    point; those left out belong to no category.

    Raises:
        ValueError: an unknown parameter, classifiers without 91 rows, or copies of shared parameters that differ.
    """
    state = {}
    for name, value in official.items():
        if shared_with(name, value, official):
            continue
        if re.match(r"class_embed\.|transformer\.enc_out_class_embed\.|label_enc\.", name):
            rows = ROWS + name.startswith("label_enc.")
            if value.shape[0] != rows:
                raise ValueError(f"{name} has {value.shape[0]} rows; expected {rows}, from COCO's category ids")
            value = value[list(COCO_IDS)]
        if _POINTWISE.fullmatch(name.removeprefix(_BACKBONE)):
            value = value[..., None, None]
        state[new_name(name)] = value
    return state


def convert_dino(checkpoint: str | Path, out_path: str | Path, config: str | Path) -> int:
    """Write ``out_path``, a checkpoint for ``config``. Returns: number of its tensors."""
    official = read_checkpoint(checkpoint, OFFICIAL)
    with blaming(f"{checkpoint} is not an official {OFFICIAL} checkpoint"):
        state = convert_state_dict(official)
    return write_converted(state, checkpoint, out_path, config, "DINO")


def _neck(level: int) -> str:
    return f"convs.{level}" if level < _LEVELS else f"extra_convs.{level - _LEVELS}"
