# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a small SAM, its box-prompt items, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

TINY_SAM = {
    "image_size": 64,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "window_size": 3,
    "global_attn_indexes": [1],
    "use_rel_pos": True,
    "prompt_embed_dim": 16,
    "mask_in_chans": 4,
    "transformer_depth": 2,
    "transformer_heads": 2,
    "transformer_mlp_dim": 32,
    "num_multimask_outputs": 3,
    "iou_head_depth": 2,
    "iou_head_hidden_dim": 16,
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images and weights; tests that ask for it are skipped where it is absent."""
    path = Path(os.environ.get("AHCQ_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path} (set AHCQ_DATA to a folder with coco_val/, coco_train/, yolox_nano/)")
    return path


def make_tiny_sam():
    """A 64-pixel SAM with random weights, the same every time."""
    from ahcq_plugin.zoo.sam import build_sam

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = build_sam(TINY_SAM, checkpoint=False)
        # segment_anything starts position tables and embeddings at zero; a model with structure everywhere tests more.
        for parameter in sam.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
    return sam.eval()


def make_tiny_items() -> list[dict[str, torch.Tensor]]:
    """Three box-prompt items of the small SAM, with 1, 2 and 3 boxes."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for boxes in (1, 2, 3):
        corner = torch.rand(boxes, 2, generator=generator) * 30
        size = 8 + torch.rand(boxes, 2, generator=generator) * 20
        items.append(
            {
                "image": torch.randn(1, 3, 64, 64, generator=generator),
                "boxes": torch.cat([corner, corner + size], 1),
            }
        )
    return items


@pytest.fixture
def tiny_sam():
    return make_tiny_sam()


@pytest.fixture
def tiny_items() -> list[dict[str, torch.Tensor]]:
    return make_tiny_items()
