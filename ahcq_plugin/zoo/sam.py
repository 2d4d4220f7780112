# SPDX-License-Identifier: Apache-2.0
"""Segment Anything models: the packaged ``sam_tiny``, the published sizes, and any size given as a dict.

Only classes of the ``segment_anything`` package are used, so a model built here has the module names and the
``state_dict`` layout of the published code.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
#: Models whose weights come with the package.
PACKAGED = ("sam_tiny", "sam2_tiny")
#: Where the published weights are looked for when no path is given (relative to the working directory).
CHECKPOINT_DIR = Path("checkpoints")

_KEYS = frozenset(
    (
        "image_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "window_size",
        "global_attn_indexes",
        "use_rel_pos",
        "prompt_embed_dim",
        "mask_in_chans",
        "transformer_depth",
        "transformer_heads",
        "transformer_mlp_dim",
        "num_multimask_outputs",
        "iou_head_depth",
        "iou_head_hidden_dim",
        "pixel_mean",
        "pixel_std",
    )
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published weight file. The MD5 of its bytes starts with ``md5_prefix`` ('': not known)."""

    file: str
    url: str
    md5_prefix: str


def _published(size: str, md5_prefix: str) -> PublishedCheckpoint:
    file = f"sam_vit_{size}_{md5_prefix}.pth"
    return PublishedCheckpoint(file, f"https://dl.fbaipublicfiles.com/segment_anything/{file}", md5_prefix)


CHECKPOINTS = {
    "vit_b": _published("b", "01ec64"),
    "vit_l": _published("l", "0b3195"),
    "vit_h": _published("h", "4b8939"),
}


def packaged_config(name: str = "sam_tiny") -> dict[str, Any]:
    """The ``model`` section of a packaged json file: constructor arguments for :func:`build_sam`."""
    return json.loads((WEIGHTS_DIR / f"{name}.json").read_text(encoding="utf-8"))["model"]


def default_checkpoint(name: str) -> Path:
    """Where the weights of a named model are when no path is given."""
    return WEIGHTS_DIR / f"{name}.pth" if name in PACKAGED else CHECKPOINT_DIR / CHECKPOINTS[name].file


def build_sam(name_or_cfg: str | Mapping[str, Any], checkpoint: str | Path | bool | None = None) -> Sam:
    """Build a Sam in evaluation mode, parameters in float32 on the CPU.

    Args:
        name_or_cfg: ``"sam_tiny"``, ``"vit_b"``, ``"vit_l"``, ``"vit_h"``, or a mapping with the keys of
            :func:`packaged_config`.
        checkpoint: path of a ``state_dict``; ``None``: the packaged weights of ``sam_tiny``, or the published file
            in :data:`CHECKPOINT_DIR`; ``False``: random weights.

    Raises:
        FileNotFoundError: the weight file is missing; the message says where to get it and where to put it.
        ValueError: unknown name or key, damaged file, or weights of another model.
    """
    if isinstance(name_or_cfg, Mapping):
        sam = _from_config(name_or_cfg)
        if checkpoint is None:
            raise ValueError("`checkpoint` is needed with a config: give a path, or False for random weights")
        source = None
    elif name_or_cfg == "sam_tiny":
        sam, source = _from_config(packaged_config()), None
        checkpoint = default_checkpoint(name_or_cfg) if checkpoint is None else checkpoint
    elif name_or_cfg in CHECKPOINTS:
        source = CHECKPOINTS[name_or_cfg]
        checkpoint = default_checkpoint(name_or_cfg) if checkpoint is None else checkpoint
        if checkpoint is not False:  # a ViT-H takes seconds to build: complain about its file first
            require_file(Path(checkpoint), source)
        sam = sam_model_registry[name_or_cfg](checkpoint=None)
    else:
        raise ValueError(f"unknown model {name_or_cfg!r}, allowed: sam_tiny, {', '.join(CHECKPOINTS)}, or a mapping")
    if checkpoint is True:
        raise ValueError("`checkpoint` must be a path, None or False, got True")
    if checkpoint is not False:
        load_weights(sam, checkpoint, source)
    return sam.float().eval()


def name_of_state(state: Mapping[str, Any]) -> str:
    """Name of the SAM, as :func:`build_sam` takes it, that a ``state_dict`` belongs to, quantized or not.

    Raises ValueError when it is none of the named ones.
    """
    packaged = packaged_config()
    known = {(packaged["image_size"] // packaged["patch_size"], packaged["embed_dim"]): "sam_tiny"}
    known |= {(64, 768): "vit_b", (64, 1024): "vit_l", (64, 1280): "vit_h"}
    table = state.get("image_encoder.pos_embed")
    size = (table.shape[1], table.shape[3]) if isinstance(table, Tensor) and table.ndim == 4 else None
    if size not in known:
        raise ValueError(f"these weights belong to none of {', '.join(known.values())}: (grid, width) is {size}")
    return known[size]


def load_weights(sam: nn.Module, path: str | Path, source: PublishedCheckpoint | None = None) -> None:
    """Load a ``state_dict`` file, bare or as ``{"model": ...}``, strictly into ``sam``; half precision is widened.

    ``source``, when its file name is that of ``path``, has the MD5 prefix compared first.
    Raises FileNotFoundError or, in one line, ValueError.
    """
    path = Path(path)
    require_file(path, source)
    if source is not None and source.md5_prefix and path.name == source.file:
        with path.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        if not md5.startswith(source.md5_prefix):
            raise ValueError(
                f"{path} is damaged: its MD5 is {md5}, expected {source.md5_prefix}…; "
                f"download it again from {source.url}"
            )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path} as a PyTorch state_dict ({reason}); copy or download it again") from error
    if isinstance(state, Mapping) and set(state) == {"model"}:  # SAM 2's files
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, expected a state_dict (names to tensors)")
    own = sam.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is not in the model" for k in state if k not in own]
    wrong += [
        f"{k} has shape {tuple(state[k].shape)}, the model {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} of {len(own)} tensors differ, first: {wrong[0]}")
    sam.load_state_dict(state)


def box_forward(sam: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One mask per box for one image: encoder, prompt encoder, decoder, without post-processing.

    Args:
        sam: anything with ``image_encoder``, ``prompt_encoder`` and ``mask_decoder`` called as Sam's are.
        batch: ``image`` (1, 3, S, S) float32, normalised and zero-padded; ``boxes`` (N, 4) float32, xyxy in pixels
            of that input. Both are moved to the model's device.

    Returns: mask logits (N, 1, h, w) at four times the grid of the embedding, and predicted IoU (N, 1).
    """
    device = next(sam.parameters()).device
    embedding = sam.image_encoder(batch["image"].to(device))
    sparse, dense = sam.prompt_encoder(points=None, boxes=batch["boxes"].to(device), masks=None)
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )


def require_file(path: Path, source: PublishedCheckpoint | None) -> None:
    """FileNotFoundError unless ``path`` is a file; the message says where ``source`` is to be had."""
    if path.is_file():
        return
    if source is None:
        raise FileNotFoundError(f"no weight file {path}")
    raise FileNotFoundError(
        f"no weight file {path}: download {source.url} and put it there (or give its path); "
        "--dry-run works with random weights"
    )


def _from_config(cfg: Mapping[str, Any]) -> Sam:
    if set(cfg) != _KEYS:
        raise ValueError(
            f"model config: missing keys {sorted(_KEYS - set(cfg))}, unknown keys {sorted(set(cfg) - _KEYS)}"
        )
    size, patch, dim = cfg["image_size"], cfg["patch_size"], cfg["prompt_embed_dim"]
    if size % patch:
        raise ValueError(f"`image_size` must be a multiple of `patch_size`, got {size} and {patch}")
    grid = size // patch
    encoder = ImageEncoderViT(
        img_size=size,
        patch_size=patch,
        embed_dim=cfg["embed_dim"],
        depth=cfg["depth"],
        num_heads=cfg["num_heads"],
        mlp_ratio=cfg["mlp_ratio"],
        out_chans=dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=cfg["use_rel_pos"],
        window_size=cfg["window_size"],
        global_attn_indexes=tuple(cfg["global_attn_indexes"]),
    )
    prompt = PromptEncoder(
        embed_dim=dim,
        image_embedding_size=(grid, grid),
        input_image_size=(size, size),
        mask_in_chans=cfg["mask_in_chans"],
    )
    decoder = MaskDecoder(
        transformer_dim=dim,
        num_multimask_outputs=cfg["num_multimask_outputs"],
        transformer=TwoWayTransformer(
            depth=cfg["transformer_depth"],
            embedding_dim=dim,
            num_heads=cfg["transformer_heads"],
            mlp_dim=cfg["transformer_mlp_dim"],
        ),
        iou_head_depth=cfg["iou_head_depth"],
        iou_head_hidden_dim=cfg["iou_head_hidden_dim"],
    )
    return Sam(encoder, prompt, decoder, pixel_mean=list(cfg["pixel_mean"]), pixel_std=list(cfg["pixel_std"]))
