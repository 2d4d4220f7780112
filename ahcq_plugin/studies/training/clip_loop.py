# SPDX-License-Identifier: Apache-2.0
"""Training of a small SAM 2 on clips: one process, checkpoints that resume exactly, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.studies.training.clip_samples import ClipSampleCfg, make_clip
from ahcq_plugin.studies.training.init import cosine_patches, start_decoder
from ahcq_plugin.studies.training.job import Job, carry_out, write_result
from ahcq_plugin.studies.training.losses import DenseHead, dense_loss
from ahcq_plugin.studies.training.pool import Pool, load_pools
from ahcq_plugin.studies.training.run import Run, Schedule, keep_freed_memory
from ahcq_plugin.studies.training.tracking import Prompts, image_levels, track, tracking_loss
from ahcq_plugin.zoo.clips import render_clip
from ahcq_plugin.zoo.sam2 import build_sam2

#: The model that comes with the package: constructor arguments of ``build_sam2``.
SAM2_TINY = {
    "image_size": 128,
    "embed_dim": 28,
    "num_heads": 1,
    "stages": [1, 2, 3, 1],
    "window_spec": [8, 4, 8, 4],
    "global_att_blocks": [5],
    "d_model": 96,
    "memory_dim": 48,
    "memory_layers": 2,
    "memory_mlp_dim": 256,
    "num_maskmem": 3,
    "max_obj_ptrs": 3,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the video predictor
HELD_OUT_SEED = 77


@dataclass(frozen=True)
class ClipTrainCfg(Schedule):
    """Everything that decides the result of a run, together with the model's config and the images."""

    batch: int = 4  # clips a step
    dense_weight: float = 0.6
    plain_weight: float = 3.0  # of the plain cross-entropy, reached at ``forced_steps``
    first_weight: float = 0.3  # of the first frame
    forced_steps: int = 1000  # steps until the memory sees predicted masks only
    box_share: float = 0.2  # of steps whose first frame is told boxes, not masks
    late_frames: int = 6  # of clips in the last part
    sample: ClipSampleCfg = ClipSampleCfg()


class Clips(Dataset):
    """Sample ``i`` of a run; those from step ``cfg.decay_start`` on are longer."""

    def __init__(self, cfg: ClipTrainCfg, pool: Pool) -> None:
        self.cfg, self.pool = cfg, pool
        self.late = replace(cfg.sample, frames=cfg.late_frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        late = index // self.cfg.batch >= self.cfg.decay_start
        return make_clip(self.cfg.seed, index, self.late if late else self.cfg.sample, self.pool)


def train_clips(model_cfg: Mapping[str, Any], cfg: ClipTrainCfg, job: Job) -> Path:
    """Train a SAM 2 in this process and return the path of its weights, ``job.weights_file``.

    Args: model_cfg: arguments of ``build_sam2``.
    Raises: ValueError: several processes; a saved state beyond ``cfg.steps``.
    """
    if job.processes != 1:
        raise ValueError(f"a SAM 2 is trained in one process, got `processes` = {job.processes}")
    Path(job.out_dir).mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    pool, held_out = load_pools(job.coco, job.extra)
    run = ClipRun(init_sam2(model_cfg, cfg.seed).to(job.device), cfg)
    run.head.to(job.device)
    carry_out(run, Clips(cfg, pool), job, held_out_j)
    write_result(run, job, model_cfg, len(pool), held_out)
    return job.weights_file


def init_sam2(cfg: Mapping[str, Any], seed: int) -> SAM2Base:
    """A SAM 2 in training mode with random weights; decoder and patches start as ``init_sam`` has them, and every
    object counts as present at first."""
    torch.manual_seed(seed)
    model = build_sam2(cfg, checkpoint=False).train()
    start_decoder(model.sam_prompt_encoder, model.sam_mask_decoder)
    with torch.no_grad():
        cosine_patches(model.image_encoder.trunk.patch_embed.proj.weight)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3)
    return model


class ClipRun(Run):
    """A run of a SAM 2; the dense heads read its features at strides 8 and 16."""

    def __init__(self, model: SAM2Base, cfg: ClipTrainCfg) -> None:
        head = nn.ModuleList([DenseHead(model.hidden_dim), DenseHead(model.hidden_dim)])
        inside = {id(p) for p in model.image_encoder.parameters()}
        parts = [
            [*model.image_encoder.parameters(), *head.parameters()],
            [p for p in model.parameters() if id(p) not in inside],
        ]
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        matrices = [m.weight for root in (model, head) for m in root.modules() if isinstance(m, kinds)]
        super().__init__(model, head, parts, matrices, cfg)

    def advance(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step on a batch of clips."""
        cfg, targets = self.cfg, batch["targets"].flatten(0, 1)
        clips, frames = batch["frames"].shape[:2]
        owner = torch.arange(clips, device=targets.device).repeat_interleave(batch["targets"].shape[1])
        ramp = min(1.0, self.step / cfg.forced_steps)
        forced = torch.rand(len(targets), device=targets.device) < 1 - ramp
        gap = int(torch.randint(1, 60, ())) if torch.rand(()) < 0.3 else 0
        if torch.rand(()) < cfg.box_share:
            prompts = Prompts(boxes=batch["boxes"].flatten(0, 1))
        else:
            prompts = Prompts(masks=targets[:, :1])
        # the maps are small: plain attention is faster than the fused one, above all backwards
        with torch.autocast(targets.device.type, torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            features, levels = image_levels(self.model, normalise(batch["frames"].flatten(0, 1)))
            labels, extents = batch["labels"].flatten(0, 1), batch["extents"].flatten(0, 1)
            fine, terms = dense_loss(self.head[0], levels[1], labels, extents)
            coarse, _ = dense_loss(self.head[1], levels[2], labels[:, ::2, ::2], extents[:, :, ::2, ::2])
            predictions = track(self.model, features, frames, owner, prompts, gap, targets, forced)
        loss, more = tracking_loss(predictions, targets, cfg.plain_weight * ramp, cfg.first_weight)
        self.update(cfg.dense_weight * (fine + coarse) / 2 + loss)
        return {**terms, **more}


def normalise(frames: Tensor) -> Tensor:
    """Frames (n, 3, S, S) uint8 as the video predictor feeds them to the model, float32."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (MEAN, STD))
    return (frames.float() / 255 - mean) / std


@torch.no_grad()
def held_out_j(model: SAM2Base, clips: int = 24, frames: int = 8) -> dict[str, float]:
    """Mean region similarity J on generated clips of another seed, and of first masks copied to every frame.

    All frames but the first; where an object has gone, an empty prediction counts 1. In bfloat16: to follow a run.
    """
    ours, copied = [], []
    for index in range(clips):
        images, masks = render_clip((HELD_OUT_SEED, index), frames, model.image_size)
        device = next(model.parameters()).device
        truth = torch.from_numpy(masks).to(device).transpose(0, 1)
        pixels = normalise(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))
        with torch.autocast(device.type, torch.bfloat16):
            features, _ = image_levels(model, pixels)
            owner = torch.zeros(len(truth), dtype=torch.long, device=device)
            predictions = track(model, features, frames, owner, Prompts(masks=truth[:, :1]))
        logits = torch.stack(predictions.logits, 1).float()
        logits = torch.nn.functional.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)
        seen = (torch.stack(predictions.score, 1) > 0)[..., None, None]
        ours.append(mask_iou((logits > 0) & seen, truth)[:, 1:].mean(1))
        copied.append(mask_iou(truth[:, :1].expand_as(truth), truth)[:, 1:].mean(1))
    return {"J": round(float(torch.cat(ours).mean()), 4), "copied": round(float(torch.cat(copied).mean()), 4)}
