# SPDX-License-Identifier: Apache-2.0
"""SAM 2 video models: the packaged ``sam2_tiny``, the published sizes, and any size given as a mapping.

Only classes of the ``sam2`` package are used, so a model built here has the module names and the ``state_dict`` layout
of the published code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sam2.build_sam import build_sam2_video_predictor
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor

from ahcq_plugin.zoo.checkpoints import default_checkpoint, load_weights, packaged_config, require_file
from ahcq_plugin.zoo.published import PUBLISHED_FILES, PublishedFile
from ahcq_plugin.zoo.rebuild import remember
from ahcq_plugin.zoo.sizes import built_of, check_sizes


@dataclass(frozen=True)
class PublishedModel:
    """A published SAM 2: its config in the ``sam2`` package and its weight file (no checksum is published)."""

    config: str
    checkpoint: PublishedFile


#: ``sam2_t``, ``sam2_s``, ``sam2_bp``, ``sam2_l`` and the same with ``sam2.1_``.
PUBLISHED = {
    f"{version}_{size}": PublishedModel(
        f"configs/{version}/{version}_hiera_{'b+' if size == 'bp' else size}.yaml",
        PUBLISHED_FILES[f"{version}_{size}"],
    )
    for version in ("sam2", "sam2.1")
    for size in ("t", "s", "bp", "l")
}


def build_sam2(name_or_cfg: str | Mapping[str, Any], checkpoint: str | Path | bool | None = None) -> SAM2VideoPredictor:
    """Build a SAM 2 video predictor in evaluation mode, parameters in float32 on the CPU, no post-processing.

    Args:
        name_or_cfg: ``"sam2_tiny"``, a name in :data:`PUBLISHED`, ``{"name": one of these, "image_size": S}`` for
            another input size than 1024, or a mapping with the keys of
            :func:`~ahcq_plugin.zoo.checkpoints.packaged_config`.
        checkpoint: path of a ``state_dict``; ``None``: the packaged weights of ``sam2_tiny``, or the published file in
            :data:`~ahcq_plugin.zoo.checkpoints.CHECKPOINT_DIR`; ``False``: random weights.

    Raises FileNotFoundError when the weight file is missing (the message says where to get it); ValueError for an
    unknown name or key, a damaged file or weights of another model.
    """
    if checkpoint is True:
        raise ValueError("`checkpoint` must be a path, None or False, got True")
    if not isinstance(name_or_cfg, (str, Mapping)):
        raise ValueError(f"unknown model {name_or_cfg!r:.60}, allowed: sam2_tiny, {', '.join(PUBLISHED)}, or a mapping")
    cfg = {"name": name_or_cfg} if isinstance(name_or_cfg, str) else dict(name_or_cfg)
    if "name" in cfg and cfg["name"] != "sam2_tiny":
        return _build_published(cfg, checkpoint)
    if cfg == {"name": "sam2_tiny"}:
        cfg = packaged_config("sam2_tiny")
        checkpoint = default_checkpoint("sam2_tiny") if checkpoint is None else checkpoint
    if checkpoint is None:
        raise ValueError("`checkpoint` is needed with a config: give a path, or False for random weights")
    model = _from_config(cfg)
    if checkpoint is not False:
        load_weights(model, checkpoint)
    remember(model, "sam2", cfg)
    return model.float().eval()


def name_of_state(state: Mapping[str, Any]) -> str:
    """Name of the SAM 2, as :func:`build_sam2` takes it, that a ``state_dict`` belongs to, quantized or not.

    Raises ValueError when it is none of the named ones.
    """
    packaged = packaged_config("sam2_tiny")
    known = {(96, 12): "t", (96, 16): "s", (112, 24): "bp", (144, 48): "l"}
    patches = state.get("image_encoder.trunk.patch_embed.proj.weight")
    blocks = {match[1] for name in state if (match := re.match(r"image_encoder\.trunk\.blocks\.(\d+)\.", name))}
    size = (len(patches) if isinstance(patches, Tensor) and patches.ndim else 0, len(blocks))
    if size == (packaged["embed_dim"], sum(packaged["stages"])):
        return "sam2_tiny"
    if size not in known:
        raise ValueError(
            f"these weights belong to none of sam2_tiny, {', '.join(PUBLISHED)}: (width, blocks) is {size}"
        )
    return f"{'sam2.1' if 'no_obj_embed_spatial' in state else 'sam2'}_{known[size]}"


def _build_published(cfg: Mapping[str, Any], checkpoint: str | Path | Literal[False] | None) -> SAM2VideoPredictor:
    if not isinstance(cfg["name"], str) or cfg["name"] not in PUBLISHED:
        raise ValueError(f"unknown model {cfg['name']!r}, allowed: sam2_tiny, {', '.join(PUBLISHED)}, or a mapping")
    if set(cfg) - {"name", "image_size"}:
        raise ValueError(
            f"model config: keys beside 'name' and 'image_size': {sorted(set(cfg) - {'name', 'image_size'})}"
        )
    published = PUBLISHED[cfg["name"]]
    path = default_checkpoint(cfg) if checkpoint is None else checkpoint
    if path is not False:  # the large one takes seconds to build: complain about its file first
        require_file(Path(path), published.checkpoint)
    size = cfg.get("image_size", 1024)
    _check_size(size)
    model = build_sam2_video_predictor(
        published.config,
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={size}"],
        apply_postprocessing=False,
    )
    if path is not False:
        load_weights(model, path, published.checkpoint)
    remember(model, "sam2", cfg)
    return model.float().eval()


def _check_size(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 32:
        raise ValueError(f"`image_size` must be a multiple of 32, got {size}")


def _from_config(cfg: Mapping[str, Any]) -> SAM2VideoPredictor:
    """One mask for each object and frame (no ambiguity tokens); everything else as in the SAM 2.1 configs."""
    check_sizes(cfg, packaged_config("sam2_tiny"))
    _check_size(cfg["image_size"])
    if cfg["d_model"] % 16 or cfg["d_model"] % cfg["memory_dim"]:
        raise ValueError(
            f"`d_model` must be a multiple of 16 and of `memory_dim`, got {cfg['d_model']} and {cfg['memory_dim']}"
        )
    with built_of("SAM 2"):
        return _built(cfg)


def _built(cfg: Mapping[str, Any]) -> SAM2VideoPredictor:
    size, width, dim, memory = cfg["image_size"], cfg["embed_dim"], cfg["d_model"], cfg["memory_dim"]
    encoder = ImageEncoder(
        trunk=Hiera(
            embed_dim=width,
            num_heads=cfg["num_heads"],
            stages=tuple(cfg["stages"]),
            global_att_blocks=tuple(cfg["global_att_blocks"]),
            window_pos_embed_bkg_spatial_size=(7, 7),
            window_spec=tuple(cfg["window_spec"]),
        ),
        neck=FpnNeck(
            position_encoding=PositionEmbeddingSine(dim),
            d_model=dim,
            backbone_channel_list=[8 * width, 4 * width, 2 * width, width],
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        ),
        scalp=1,
    )
    grid = size // 16
    rope = {"embedding_dim": dim, "num_heads": 1, "downsample_rate": 1, "rope_theta": 10000.0, "feat_sizes": [grid] * 2}
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=memory),
        d_model=dim,
        dim_feedforward=cfg["memory_mlp_dim"],
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**rope),
    )
    return SAM2VideoPredictor(
        image_encoder=encoder,
        memory_attention=MemoryAttention(
            d_model=dim, pos_enc_at_input=True, layer=layer, num_layers=cfg["memory_layers"]
        ),
        memory_encoder=MemoryEncoder(
            out_dim=memory,
            mask_downsampler=MaskDownSampler(embed_dim=dim, kernel_size=3, stride=2, padding=1),
            fuser=Fuser(CXBlock(dim, kernel_size=7, padding=3, layer_scale_init_value=0.1), num_layers=2),
            position_encoding=PositionEmbeddingSine(memory),
            in_dim=dim,
        ),
        image_size=size,
        num_maskmem=cfg["num_maskmem"],
        max_obj_ptrs_in_encoder=cfg["max_obj_ptrs"],
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=True,
        proj_tpos_enc_in_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
    )
