# SPDX-License-Identifier: Apache-2.0
"""Official H-Deformable-DETR checkpoints to state dicts of :class:`~ahcq_plugin.mm.detectors.hdetr.HDeformableDETR`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from mmdet.models.backbones.swin import swin_converter
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

import ahcq_plugin.mm.detectors.hdetr  # noqa: F401  registers the detector
from ahcq_plugin.ptq.checkpoint import save_atomic

#: Rows of the official classifiers: COCO's category ids as they are, 0 unused by the decoder.
ROWS = 91
#: COCO's 80 category ids in the order of the labels: 1..90 without ten that were never annotated.
COCO_IDS = tuple(i for i in range(1, ROWS) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_BODY = "backbone.0.body."
_SHARED = re.compile(r"transformer\.decoder\.((?:class|bbox)_embed\..*)")
_DECODER_NORMS = {"1": "1", "2": "0", "3": "2"}  # self-attention comes first, but its norm is the official norm2
_RULES = (
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


def build_detector(config: str | Path, kind: str) -> nn.Module:
    """The detector of a config file, with random weights.

    Raises:
        FileNotFoundError, ValueError: no such file; another detector than ``kind``.
    """
    if not Path(config).is_file():
        raise FileNotFoundError(f"no config {config}")
    register_all_modules(init_default_scope=True)
    model = Config.fromfile(config).model
    if model.type != kind:
        raise ValueError(f"{config} has the detector {model.type}; expected {kind}")
    return MODELS.build(model).eval()


def new_name(name: str) -> str:
    """Our name of an official parameter outside the backbone.

    Raises:
        ValueError: no such parameter in H-Deformable-DETR.
    """
    for pattern, replacement in _RULES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise ValueError(f"unknown parameter {name!r}: not an official H-Deformable-DETR checkpoint")


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


def shared_with(name: str, value: Tensor, official: Mapping[str, Tensor]) -> str | None:
    """Name under which a decoder's parameter stands once more; None: it stands there once.

    Raises:
        ValueError: the two differ.
    """
    shared = _SHARED.fullmatch(name)
    if shared is None:
        return None
    own = official.get(shared[1])
    if own is None or not (own is value or torch.equal(own, value)):
        raise ValueError(f"{name} differs from {shared[1]}, with which it is shared")
    return shared[1]


def fit(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` in the order of ``model``, with its counters of batches, which official batch norms lack.

    Raises:
        ValueError: parameters are missing, left over or of another shape: another variant than the config's.
    """
    own = model.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} has no place" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, the config's {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(own)} tensors do not fit the config, first: {wrong[0]}")
    return {name: state[name] for name in own}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Official state dict of a file. Raises FileNotFoundError, and ValueError when it is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of its training are in there
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path} ({reason}); download it again") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} has no state dict under 'model': not an official H-Deformable-DETR checkpoint")
    return dict(content["model"])


def convert_hdetr(checkpoint: str | Path, out_path: str | Path, config: str | Path) -> int:
    """Write ``out_path``, a checkpoint for ``config``. Returns: number of its tensors."""
    state = fit(convert_state_dict(read_checkpoint(checkpoint)), build_detector(config, "HDeformableDETR"))
    state = {name: value.clone() for name, value in state.items()}  # rows of a view would be saved with the whole
    save_atomic({"state_dict": state, "meta": {"source": Path(checkpoint).name, "config": Path(config).name}}, out_path)
    return len(state)


def _neck(level: int) -> str:
    """Three levels come from the backbone, the fourth is made from the last of them."""
    return f"convs.{level}" if level < 3 else f"extra_convs.{level - 3}"
