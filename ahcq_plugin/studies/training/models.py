# SPDX-License-Identifier: Apache-2.0
"""Configurations of the models trained here: arguments of ``build_sam``."""

from __future__ import annotations

from typing import Any

_COMMON = {
    "mlp_ratio": 4,
    "window_size": 8,
    "use_rel_pos": True,
    "prompt_embed_dim": 128,
    "mask_in_chans": 16,
    "transformer_depth": 2,
    "transformer_heads": 4,
    "transformer_mlp_dim": 512,
    "num_multimask_outputs": 3,
    "iou_head_depth": 3,
    "iou_head_hidden_dim": 128,
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}

MODELS: dict[str, dict[str, Any]] = {
    # 1024 tokens, sixteen full windows
    "sam_tiny": {
        **_COMMON,
        "image_size": 256,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "global_attn_indexes": [2, 5],
    },
    # 1024 tokens of larger images
    "sam_small": {
        **_COMMON,
        "image_size": 512,
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 10,
        "num_heads": 6,
        "window_size": 7,
        "global_attn_indexes": [2, 5, 9],
        "prompt_embed_dim": 192,
        "transformer_mlp_dim": 768,
    },
}
