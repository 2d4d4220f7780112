# SPDX-License-Identifier: Apache-2.0
"""Backbones of timm and torchvision, cut down: few blocks, narrow, small images."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families.case import ITEMS, Case, Family, image

VIT = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 10}


def _timm(name: str, side: int = 64, **options: Any) -> Case:
    import timm

    model = timm.create_model(name, pretrained=False, **options)
    return Case(model, [(image(side, 2, seed),) for seed in range(ITEMS)])


def _mvit() -> Case:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    cfg = MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=(16, 32, 64), num_heads=(1, 2, 4))
    return Case(MultiScaleVit(cfg, img_size=64, num_classes=10), [(image(64, 2, seed),) for seed in range(ITEMS)])


def _vision_transformer() -> Case:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    return Case(model, [(image(32, 2, seed),) for seed in range(ITEMS)])


def _swin(version: int) -> Case:
    from torchvision.models import swin_transformer as swin

    block = swin.SwinTransformerBlock if version == 1 else swin.SwinTransformerBlockV2
    merging = swin.PatchMerging if version == 1 else swin.PatchMergingV2
    model = swin.SwinTransformer(
        [4, 4], 16, [2, 2], [1, 2], [4, 4], num_classes=10, block=block, downsample_layer=merging
    )
    return Case(model, [(image(64, 2, seed),) for seed in range(ITEMS)])


_TIMM = {
    "ViT": ("vit_tiny_patch16_224", VIT),
    "DeiT III": ("deit3_small_patch16_224", VIT),
    "DINOv2": ("vit_small_patch14_dinov2", {**VIT, "img_size": 56}),
    "DINOv2 giant (SwiGLU)": ("vit_giant_patch14_dinov2", {**VIT, "img_size": 56}),
    "DINOv3": ("vit_small_patch16_dinov3", VIT),
    "EVA-02": ("eva02_tiny_patch14_224", {**VIT, "img_size": 56}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10},
    ),
    "Swin V2": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10},
    ),
    "BEiT": ("beit_base_patch16_224", VIT),
    "Hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "ConvNeXt": ("convnext_tiny", STAGES),
    "ConvNeXt V2": ("convnextv2_tiny", STAGES),
    "TinyViT": (
        "tiny_vit_5m_224",
        {"embed_dims": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 10},
    ),
    "RepViT": ("repvit_m1", {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1), "num_classes": 10}),
    "MaxViT": (
        "maxvit_rmlp_pico_rw_256",
        {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_classes": 10},
    ),
    "SigLIP": ("vit_base_patch16_siglip_224", {**VIT, "num_classes": 0}),
}
_SIDES = {"Swin": 56, "EVA-02": 56, "DINOv2": 56, "DINOv2 giant (SwiGLU)": 56, "TinyViT": 224}

FAMILIES = [
    *(
        Family(name, "timm", partial(_timm, model, _SIDES.get(name, 64), **options))
        for name, (model, options) in _TIMM.items()
    ),
    Family("MViT V2", "timm", _mvit),
    Family("ViT-B/16", "torchvision", _vision_transformer),
    Family("Swin", "torchvision", partial(_swin, 1)),
    Family("Swin V2", "torchvision", partial(_swin, 2)),
]
