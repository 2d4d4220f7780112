# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a small SAM, its box-prompt items, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import skips

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run, and no opinion on how fast the machine is.
settings.register_profile("repository", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repository")

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

SMALL_SAM2 = {
    "image_size": 64,
    "embed_dim": 16,
    "num_heads": 1,
    "stages": [1, 1, 2, 1],
    "window_spec": [8, 4, 6, 7],
    "global_att_blocks": [3],
    "d_model": 32,
    "memory_dim": 16,
    "memory_layers": 2,
    "memory_mlp_dim": 64,
    "num_maskmem": 7,
    "max_obj_ptrs": 16,
}


def pytest_configure(config: pytest.Config) -> None:
    skips.register(config)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images and weights; tests that ask for it are skipped where it is absent."""
    named = os.environ.get("AHCQ_DATA")
    path = Path(named or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        problem = "AHCQ_DATA names no folder, it is" if named else "no real data at"
        pytest.skip(f"{problem} {path} (set AHCQ_DATA to a folder with coco_val/, coco_train/, yolox_nano/)")
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


def computing_state(model) -> dict[str, torch.Tensor]:
    """What of a frozen model's state it computes with: all but modes of quantizers and what calibration collected."""
    from ahcq_plugin.ptq.packed_state import calibration_state

    left_out = calibration_state(model)
    return {name: value for name, value in model.state_dict().items() if name not in left_out}


def assert_packed_file_gives_back(model, report, items, path: Path) -> None:
    """A frozen 64-pixel SAM, written to ``path`` and read, computes with the same state and gives the same bits."""
    from ahcq_plugin import load_quantized, save_quantized
    from ahcq_plugin.zoo.sam import box_forward, build_sam

    save_quantized(model, path, report=report)
    loaded = load_quantized(path, lambda _: build_sam(TINY_SAM, checkpoint=False))
    kept = computing_state(model)
    assert all(torch.equal(value, kept[name]) for name, value in computing_state(loaded).items())
    with torch.no_grad():
        for item in items:
            for found, wanted in zip(box_forward(loaded, item), box_forward(model, item), strict=True):
                assert torch.equal(found, wanted)


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


def make_sam2(name_or_cfg=None):
    """A SAM 2 with random weights in which everything matters; by default a 64-pixel one, the same every time."""
    from ahcq_plugin.zoo.sam2 import build_sam2

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_sam2(SMALL_SAM2 if name_or_cfg is None else name_or_cfg, checkpoint=False)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.data.fill_(0.3)  # starts at 1e-6: the memory encoder's blocks would do nothing
            elif not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
        # an object that is judged absent has the logit -1024 everywhere
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(20.0)
    return model.eval()


def make_clips(count: int = 2, frames: int = 3, objects: int = 2, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Clips with first-frame masks; every clip after the first has one object less, but at least one."""
    generator = torch.Generator().manual_seed(2)
    clips = []
    for number in range(count):
        masks = torch.zeros(max(objects - number, 1), size, size, dtype=torch.bool)
        for index, mask in enumerate(masks):
            mask[size // 8 + index * 5 : size // 2, size // 8 : size // 2 + index * 7 + number] = True
        clips.append({"frames": torch.randn(frames, 3, size, size, generator=generator), "masks": masks})
    return clips


@pytest.fixture
def small_sam2():
    pytest.importorskip("sam2")
    return make_sam2()


@pytest.fixture
def small_clips() -> list[dict[str, torch.Tensor]]:
    return make_clips()
