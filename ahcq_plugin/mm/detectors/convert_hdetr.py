# SPDX-License-Identifier: Apache-2.0
"""Official H-Deformable-DETR checkpoints to state dicts of :class:`~ahcq_plugin.mm.detectors.hdetr.HDeformableDETR`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmdet.models.backbones.swin import swin_converter
from torch import Tensor

import ahcq_plugin.mm.detectors.hdetr  # noqa: F401  registers the detector
from ahcq_plugin.mm.detectors.official import COCO_IDS, ROWS, read_checkpoint, renamed, shared_with, write_converted
from ahcq_plugin.support.batches import blaming

OFFICIAL = "H-Deformable-DETR"
_BODY = "backbone.0.body."
_DECODER_NORMS = {"1": "1", "2": "0", "3": "2"}  # self-attention comes first, but its norm is the official norm2
#: Names outside the backbone: beginning of the official one, of ours.
RULES = (
    (r"transformer\.level_embed", "level_embed"),
    (r"query_embed\.", "query_embedding."),
    (r"transformer\.enc_output\.", "memory_trans_fc."),
    (r"transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"transformer\.pos_trans\.", "pos_trans_fc."),
    (r"transformer\.pos_trans_norm\.", "pos_trans_norm."),
    (r"input_proj\.(\d+)\.([01])\.", lambda m: f"neck.{_neck(int(m[1]))}.{('conv', 'gn')[int(m[2])]}."),
    (r"class_embed\.(\d+)\.", r"bbox_head.cls_branches.\1."),
    (r"bbox_embed\.(\d+)\.layers\.(\d+)\.", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}."),
    (r"transformer\.(encoder|decoder)\.layers\.(\d+)\.linear1\.", r"\1.layers.\2.ffn.layers.0.0."),
    (r"transformer\.(encoder|decoder)\.layers\.(\d+)\.linear2\.", r"\1.layers.\2.ffn.layers.1."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm(\d)\.", lambda m: f"encoder.layers.{m[1]}.norms.{int(m[2]) - 1}."),
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm(\d)\.",
        lambda m: f"decoder.layers.{m[1]}.norms.{_DECODER_NORMS[m[2]]}.",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.self_attn."),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attn.attn."),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attn."),
)


def new_name(name: str) -> str:
    """Our name of an official parameter outside the backbone.

    Raises:
        ValueError: no such parameter in H-Deformable-DETR.
    """
    new = renamed(name, RULES)
    if new is None:
        raise ValueError(f"unknown parameter {name!r}: not an official {OFFICIAL} checkpoint")
    return new


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the official one.

    The decoder's classifiers keep the rows of COCO's 80 categories. The encoder's (the last) says in its first row
    whether a point is an object, in both models; that row stays the first.

    Raises:
        ValueError: an unknown parameter, classifiers without 91 rows, or copies of shared parameters that differ.
    """
    body = {name.removeprefix(_BODY): value for name, value in official.items() if name.startswith(_BODY)}
    swin = any(name.startswith("patch_embed.") for name in body)
    state = dict(swin_converter(body)) if swin else {f"backbone.{name}": value for name, value in body.items()}
    classifiers = [int(name.split(".")[1]) for name in official if name.startswith("class_embed.")]
    for name, value in official.items():
        if name.startswith(_BODY):
            continue
        if shared_with(name, value, official):
            continue
        if name.startswith("class_embed."):
            if value.shape[0] != ROWS:
                raise ValueError(f"{name} has {value.shape[0]} rows; expected {ROWS}, those of COCO's category ids")
            encoder = int(name.split(".")[1]) == max(classifiers)
            value = value[[0, *COCO_IDS[1:]] if encoder else list(COCO_IDS)]
        state[new_name(name)] = value
    return state


def convert_hdetr(checkpoint: str | Path, out_path: str | Path, config: str | Path) -> int:
    """Write ``out_path``, a checkpoint for ``config``. Returns: number of its tensors."""
    official = read_checkpoint(checkpoint, OFFICIAL)
    with blaming(f"{checkpoint} is not an official {OFFICIAL} checkpoint"):
        state = convert_state_dict(official)
    return write_converted(state, checkpoint, out_path, config, "HDeformableDETR")


def _neck(level: int) -> str:
    """Three levels come from the backbone, the fourth is made from the last of them."""
    return f"convs.{level}" if level < 3 else f"extra_convs.{level - 3}"
