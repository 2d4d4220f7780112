# SPDX-License-Identifier: Apache-2.0
"""Training of a small SAM on images: one or more processes, checkpoints that resume exactly, averaged weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from ahcq_plugin.studies.training.init import init_sam
from ahcq_plugin.studies.training.job import Job, carry_out, go_on, write_result
from ahcq_plugin.studies.training.losses import DenseHead, dense_loss, mask_loss
from ahcq_plugin.studies.training.pool import Pool, load_pools
from ahcq_plugin.studies.training.run import Run, Schedule, keep_freed_memory
from ahcq_plugin.studies.training.samples import SampleCfg, make_sample
from ahcq_plugin.studies.training.validate import held_out_iou
from ahcq_plugin.zoo.items import read_coco


@dataclass(frozen=True)
class TrainCfg(Schedule):
    """Everything that decides the result of a run, together with the model's config and the images."""

    detach_steps: int = 400  # first steps: the decoder learns to draw boxes without steering the encoder
    dense_weight: float = 0.6  # of the dense losses once the decoder steers the encoder
    late_scene_share: float = 0.4  # of samples, in the last part
    sample: SampleCfg = SampleCfg()


class Samples(Dataset):
    """Sample ``i`` of a run; images from step ``cfg.decay_start`` on follow ``cfg.late_scene_share``."""

    def __init__(self, cfg: TrainCfg, pool: Pool) -> None:
        self.cfg, self.pool = cfg, pool
        self.late = replace(cfg.sample, scene_share=cfg.late_scene_share)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        late = index // self.cfg.batch >= self.cfg.decay_start
        return make_sample(self.cfg.seed, index, self.late if late else self.cfg.sample, self.pool)


def train(model_cfg: Mapping[str, Any], cfg: TrainCfg, job: Job) -> Path:
    """Train a Sam and return the path of its weights, ``job.weights_file``.

    Args: model_cfg: arguments of ``build_sam``.
    Raises: ValueError: the samples of a step cannot be shared evenly; a saved state beyond ``cfg.steps``.
    """
    if cfg.batch % job.processes:
        raise ValueError(f"`batch` must be a multiple of `processes`, got {cfg.batch} and {job.processes}")
    Path(job.out_dir).mkdir(parents=True, exist_ok=True)
    if job.processes == 1:
        _work(0, dict(model_cfg), cfg, job)
    else:
        _check_input(model_cfg, cfg, job)
        store = Path(job.out_dir) / f".rendezvous.{os.getpid()}"
        torch.multiprocessing.spawn(_join, args=(str(store), dict(model_cfg), cfg, job), nprocs=job.processes)
        store.unlink(missing_ok=True)
    return job.weights_file


def _check_input(model_cfg: Mapping[str, Any], cfg: TrainCfg, job: Job) -> None:
    """What is wrong with the data or the saved state, said here: of another process it would be a traceback."""
    for folder in (*filter(None, [job.coco]), *(folder for folder, _ in job.extra)):
        read_coco(folder)
    go_on(_run(dict(model_cfg), cfg, job), job)


def _join(rank: int, store: str, model_cfg: dict[str, Any], cfg: TrainCfg, job: Job) -> None:
    """One of several processes."""
    if job.on_start is not None:
        job.on_start(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job.processes)
    _work(rank, model_cfg, cfg, job)
    dist.barrier()
    dist.destroy_process_group()


def _work(rank: int, model_cfg: dict[str, Any], cfg: TrainCfg, job: Job) -> None:
    keep_freed_memory()
    pool, held_out = load_pools(job.coco, job.extra)
    run = _run(model_cfg, cfg, job)
    carry_out(run, Samples(cfg, pool), job, lambda model: held_out_iou(model, job.coco, held_out), rank)
    if rank == 0:
        write_result(run, job, model_cfg, len(pool), held_out)


def _run(model_cfg: dict[str, Any], cfg: TrainCfg, job: Job) -> SamRun:
    sam = init_sam(model_cfg, cfg.seed).to(job.device)
    return SamRun(sam, DenseHead(model_cfg["prompt_embed_dim"]).to(job.device), cfg, job.processes)


class SamRun(Run):
    """A run of a Sam with its dense head."""

    def __init__(self, sam: torch.nn.Module, head: DenseHead, cfg: TrainCfg, processes: int = 1) -> None:
        prompt = [p for module in (sam.prompt_encoder, sam.mask_decoder) for p in module.parameters()]
        # apart: the decoder's gradients are larger and would shrink the encoder's
        parts = [[*sam.image_encoder.parameters(), *head.parameters()], prompt]
        # embeddings and position tables are matrices in form only
        matrices = [
            p
            for name, p in (*sam.named_parameters(), *head.named_parameters())
            if p.ndim >= 2 and not any(word in name for word in ("rel_pos", "embed", "token"))
        ]
        super().__init__(sam, head, parts, matrices, cfg, processes)

    def advance(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step on this process's share of the images."""
        cfg, sam = self.cfg, self.model
        pixels = (batch["image"].float() - sam.pixel_mean) / sam.pixel_std
        with torch.autocast(pixels.device.type, torch.bfloat16):
            embedding = sam.image_encoder(pixels)
            dense, terms = dense_loss(self.head, embedding, batch["labels"], batch["extents"])
            early = self.step < cfg.detach_steps
            mask, more = mask_loss(
                sam,
                embedding.detach() if early else embedding,
                batch["boxes"],
                batch["targets"],
                plain_share=0.0 if early else 0.5,
            )
        self.update((1.0 if early else cfg.dense_weight) * dense + mask)
        return {**terms, **more}
