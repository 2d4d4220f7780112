# SPDX-License-Identifier: Apache-2.0
"""Segment Anything models: the packaged ``sam_tiny`` and its twin that is hard to quantize, the published sizes, any
size given as a dict, and relatives.

SAMs are of the classes of the ``segment_anything`` package, relatives of those of their own, so a model built here has
the module names and the ``state_dict`` layout of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from ahcq_plugin.zoo.checkpoints import default_checkpoint, load_weights, packaged_config, require_file
from ahcq_plugin.zoo.hard import SAM_TINY_HARD, hard_config, harden
from ahcq_plugin.zoo.hugging_face import PREFIX, build_hugging_face
from ahcq_plugin.zoo.published import PUBLISHED_FILES, of_model
from ahcq_plugin.zoo.rebuild import remember
from ahcq_plugin.zoo.relatives import RELATIVES, build_relative
from ahcq_plugin.zoo.sizes import built_of, check_sizes

_HIDDEN = "image_encoder.blocks.0.mlp.lin1.weight"  # wider in the twin, and all else as in ``sam_tiny``

#: Published sizes and their weight files.
CHECKPOINTS = {entry.model: entry for entry in PUBLISHED_FILES.values() if entry.model.startswith("vit_")}

#: Keys of a prompt, see :mod:`ahcq_plugin.zoo.prompts`.
PROMPTS = ("boxes", "points", "labels", "masks")


def build_sam(name_or_cfg: str | Mapping[str, Any], checkpoint: str | Path | bool | None = None) -> nn.Module:
    """Build a Sam in evaluation mode, parameters in float32 on the CPU.

    Args:
        name_or_cfg: ``"sam_tiny"``, ``"sam_tiny_hard"`` (the same masks from weights and activations that are hard to
            quantize, see :mod:`ahcq_plugin.zoo.hard`), ``"vit_b"``, ``"vit_l"``, ``"vit_h"``, a name of
            :data:`~ahcq_plugin.zoo.relatives.RELATIVES`, ``"hf:"`` and a folder or name for
            :func:`~ahcq_plugin.zoo.hugging_face.build_hugging_face`, or a mapping with the keys of
            :func:`~ahcq_plugin.zoo.checkpoints.packaged_config`.
        checkpoint: path of a ``state_dict``; ``None``: the packaged weights of ``sam_tiny``, of which its twin is made
            too, the published file in :data:`~ahcq_plugin.zoo.checkpoints.CHECKPOINT_DIR`, or what is in the folder
            behind ``hf:``; ``False``: random weights.

    Returns: a ``Sam``, or what is called as one.

    Raises:
        FileNotFoundError: the weight file is missing; the message says where to get it and where to put it.
        ValueError: unknown name or key, a package that is not installed, damaged file, or weights of another model.
    """
    if checkpoint is True:
        raise ValueError("`checkpoint` must be a path, None or False, got True")
    check_name(name_or_cfg)
    if isinstance(name_or_cfg, Mapping):
        sam = _from_config(name_or_cfg)
        if checkpoint is None:
            raise ValueError("`checkpoint` is needed with a config: give a path, or False for random weights")
        source = None
    elif str(name_or_cfg).startswith(PREFIX):
        if checkpoint not in (None, False):
            raise ValueError(f"{name_or_cfg!r} names its weights itself: `checkpoint` must be None or False")
        return build_hugging_face(name_or_cfg.removeprefix(PREFIX), random=checkpoint is False).float().eval()
    elif name_or_cfg == "sam_tiny":
        sam, source = _from_config(packaged_config()), None
        checkpoint = default_checkpoint(name_or_cfg) if checkpoint is None else checkpoint
    elif name_or_cfg == "sam_tiny_hard" and checkpoint is None:
        twin = harden(build_sam("sam_tiny"), SAM_TINY_HARD)
        remember(twin, "sam", name_or_cfg)
        return twin
    elif name_or_cfg == "sam_tiny_hard":
        sam, source = _from_config(hard_config(packaged_config(), SAM_TINY_HARD)), None
    else:
        source = of_model(name_or_cfg)
        checkpoint = default_checkpoint(name_or_cfg) if checkpoint is None else checkpoint
        if checkpoint is not False:  # a ViT-H takes seconds to build: complain about its file first
            require_file(Path(checkpoint), source)
        relative = name_or_cfg in RELATIVES
        sam = build_relative(name_or_cfg) if relative else sam_model_registry[name_or_cfg](checkpoint=None)
    if checkpoint is not False:
        load_weights(sam, checkpoint, source)
    remember(sam, "sam", name_or_cfg)
    return sam.float().eval()


def check_name(name_or_cfg: Any) -> None:
    """ValueError for what :func:`build_sam` does not know; a mapping is not looked into."""
    known = ("sam_tiny", "sam_tiny_hard", *CHECKPOINTS, *RELATIVES)
    if isinstance(name_or_cfg, Mapping) or name_or_cfg in known or str(name_or_cfg).startswith(PREFIX):
        return
    if str(name_or_cfg).startswith("sam2"):
        raise ValueError(f"{name_or_cfg!r} is a SAM 2: build it with ahcq_plugin.zoo.sam2.build_sam2")
    raise ValueError(
        f"unknown model {name_or_cfg!r}, allowed: {', '.join(known)}, {PREFIX} and a folder or a name on Hugging "
        "Face's hub, or a mapping"
    )


def name_of_state(state: Mapping[str, Any]) -> str:
    """Name of the SAM, as :func:`build_sam` takes it, that a ``state_dict`` belongs to, quantized or not.

    Raises ValueError when it is none of the named ones.
    """
    packaged = packaged_config()
    known = {(packaged["image_size"] // packaged["patch_size"], packaged["embed_dim"]): "sam_tiny"}
    known |= {(64, 768): "vit_b", (64, 1024): "vit_l", (64, 1280): "vit_h"}
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "mobile_sam"
    table = state.get("image_encoder.pos_embed")
    size = (table.shape[1], table.shape[3]) if isinstance(table, Tensor) and table.ndim == 4 else None
    if size not in known:
        raise ValueError(f"these weights belong to none of {', '.join(known.values())}: (grid, width) is {size}")
    if known[size] == "sam_tiny":
        wider = len(state[_HIDDEN]) > int(packaged["embed_dim"] * packaged["mlp_ratio"])
        return "sam_tiny_hard" if wider else "sam_tiny"
    of_hq = "mask_decoder.hf_token.weight" in state
    return f"hq_{known[size]}" if of_hq else known[size]


def box_forward(sam: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One mask per box for one image: encoder, prompt encoder, decoder, without post-processing.

    Args:
        sam: anything with ``image_encoder``, ``prompt_encoder`` and ``mask_decoder`` called as Sam's are.
        batch: ``image`` (1, 3, S, S) float32, normalised and zero-padded; ``boxes`` (N, 4) float32, xyxy in pixels
            of that input. Both are moved to the model's device.

    Returns: mask logits (N, 1, h, w) at four times the grid of the embedding, and predicted IoU (N, 1).
    """
    embedding = sam.image_encoder(batch["image"].to(next(sam.parameters()).device))
    return decode_prompts(sam, embedding, {"boxes": batch["boxes"]})


def decode_prompts(sam: nn.Module, embedding: Tensor, prompts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One mask per object from an image's embedding (1, C, h, w), for prompts in pixels of SAM's input.

    Args:
        prompts: some of ``boxes``, ``points`` with ``labels``, ``masks``, see :mod:`ahcq_plugin.zoo.prompts`; moved to
            the embedding's device. Other keys are not read.

    Returns: mask logits (N, 1, 4h, 4w) and predicted IoU (N, 1).
    """
    given = {key: prompts[key].to(embedding.device) for key in PROMPTS if key in prompts}
    sparse, dense = sam.prompt_encoder(
        points=(given["points"], given["labels"]) if "points" in given else None,
        boxes=given.get("boxes"),
        masks=given.get("masks"),
    )
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )


def _from_config(cfg: Mapping[str, Any]) -> Sam:
    check_sizes(cfg, packaged_config())
    size, patch = cfg["image_size"], cfg["patch_size"]
    if size % patch:
        raise ValueError(f"`image_size` must be a multiple of `patch_size`, got {size} and {patch}")
    if cfg["embed_dim"] % cfg["num_heads"]:
        raise ValueError(
            f"`embed_dim` must be a multiple of `num_heads`, got {cfg['embed_dim']} and {cfg['num_heads']}"
        )
    with built_of("SAM"):
        return _built(cfg)


def _built(cfg: Mapping[str, Any]) -> Sam:
    size, patch, dim = cfg["image_size"], cfg["patch_size"], cfg["prompt_embed_dim"]
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
