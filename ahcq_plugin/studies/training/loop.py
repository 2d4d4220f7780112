# SPDX-License-Identifier: Apache-2.0
"""The training loop: one or more processes, checkpoints that resume exactly, an average of the weights."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ahcq_plugin.studies.training.init import init_sam
from ahcq_plugin.studies.training.losses import DenseHead, dense_loss, mask_loss
from ahcq_plugin.studies.training.pool import Level, load_pool
from ahcq_plugin.studies.training.run import Run, Schedule, keep_freed_memory, save
from ahcq_plugin.studies.training.samples import SampleCfg, make_sample
from ahcq_plugin.studies.training.validate import held_out_iou
from ahcq_plugin.zoo.sam import build_sam

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainCfg(Schedule):
    """Everything that decides the result of a run, together with the model's config and the images."""

    detach_steps: int = 400  # first steps: the decoder learns to draw boxes without steering the encoder
    dense_weight: float = 0.6  # of the dense losses once the decoder steers the encoder
    late_scene_share: float = 0.4  # of samples, in the last part
    sample: SampleCfg = SampleCfg()


class Samples(Dataset):
    """Sample ``i`` of a run; images from step ``cfg.decay_start`` on follow ``cfg.late_scene_share``."""

    def __init__(self, cfg: TrainCfg, pool: list[tuple[Level, Level]]) -> None:
        self.cfg, self.pool = cfg, pool
        self.late = replace(cfg.sample, scene_share=cfg.late_scene_share)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        late = index // self.cfg.batch >= self.cfg.decay_start
        return make_sample(self.cfg.seed, index, self.late if late else self.cfg.sample, self.pool)


def train(
    model_cfg: Mapping[str, Any],
    cfg: TrainCfg,
    out_dir: str | Path,
    coco: str | Path | None = None,
    processes: int = 1,
    workers: int = 0,
    device: str = "cpu",
    resume: bool = False,
    save_seconds: float = 180,
    check_every: int = 400,
) -> Path:
    """Train and return the path of the weights (``model.pth`` in ``out_dir``, fp16, averaged; ``model.json`` beside
    it holds the model's config and how it was trained).

    Args:
        model_cfg: arguments of ``build_sam``. coco: COCO folder with real images, or None for scenes only.
        processes: on a CPU, processes of one thread each that share a step's images. workers: processes that make
            samples, for each of them; 0: made in place.
        resume: go on from ``out_dir/state.pth`` when it is there.
        save_seconds, check_every: how often the state is saved, and how many steps lie between two measurements on
            held-out data. Neither changes the result.
    """
    if cfg.batch % processes:
        raise ValueError(f"`batch` must be a multiple of `processes`, got {cfg.batch} and {processes}")
    if processes > 1 and device != "cpu":
        raise ValueError(f"`processes` above 1 are for the CPU, got device {device!r}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    job = (processes, dict(model_cfg), cfg, out_dir, coco, workers, device, resume, save_seconds, check_every)
    if processes == 1:
        _work(0, *job)
    else:
        store = out_dir / f".rendezvous.{os.getpid()}"
        torch.multiprocessing.spawn(_work, args=(*job, str(store)), nprocs=processes)
        store.unlink(missing_ok=True)
    return out_dir / "model.pth"


def _work(
    rank: int,
    processes: int,
    model_cfg: dict[str, Any],
    cfg: TrainCfg,
    out_dir: Path,
    coco: Path | None,
    workers: int,
    device: str,
    resume: bool,
    save_seconds: float,
    check_every: int,
    store: str = "",
) -> None:
    if processes > 1:
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    keep_freed_memory()
    pool, held = load_pool(coco) if coco else ([], [])
    sam = init_sam(model_cfg, cfg.seed).to(device)
    head = DenseHead(model_cfg["prompt_embed_dim"]).to(device)
    run = SamRun(sam, head, cfg)
    state_file = out_dir / "state.pth"
    if resume and state_file.is_file():
        run.load(torch.load(state_file, map_location=device, weights_only=True))
    local = cfg.batch // processes
    order = [step * cfg.batch + rank * local + i for step in range(run.step, cfg.steps) for i in range(local)]
    saved, shown, first, totals = time.monotonic(), time.monotonic(), run.step, {}
    for batch in DataLoader(Samples(cfg, pool), batch_size=local, sampler=order, num_workers=workers):
        torch.manual_seed((cfg.seed * 1_000_003 + run.step) * processes + rank)
        terms = run.advance({k: v.to(device) for k, v in batch.items()}, processes)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        if rank:
            continue
        if run.step % 50 == 0:
            speed = (run.step - first) * cfg.batch / (time.monotonic() - shown)
            logger.info(
                "step %d lr %.1e %s img/s %.1f",
                run.step,
                cfg.learning_rate(run.step - 1),
                " ".join(f"{k} {v / (run.step - first):.4f}" for k, v in totals.items()),
                speed,
            )
            shown, first, totals = time.monotonic(), run.step, {}
        if time.monotonic() - saved > save_seconds:
            save(run.state(), state_file)
            saved = time.monotonic()
        if run.step % check_every == 0:
            logger.info("held out: %s", held_out_iou(run.averaged(model_cfg), coco, held))
    if rank == 0:
        save(run.state(), state_file)
        save({k: v.half() for k, v in run.average.items()}, out_dir / "model.pth")
        facts = {"model": model_cfg, "training": asdict(cfg), "real_images": len(pool), "held_out_images": held}
        (out_dir / "model.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


class SamRun(Run):
    """A run of a Sam with its dense head."""

    def __init__(self, sam: torch.nn.Module, head: DenseHead, cfg: TrainCfg) -> None:
        prompt = [p for module in (sam.prompt_encoder, sam.mask_decoder) for p in module.parameters()]
        # apart: the decoder's gradients are larger and would shrink the encoder's
        parts = [[*sam.image_encoder.parameters(), *head.parameters()], prompt]
        # embeddings and position tables are matrices in form only
        matrices = [
            p
            for name, p in (*sam.named_parameters(), *head.named_parameters())
            if p.ndim >= 2 and not any(word in name for word in ("rel_pos", "embed", "token"))
        ]
        super().__init__(sam, head, parts, matrices, cfg)

    def advance(self, batch: Mapping[str, Tensor], processes: int) -> dict[str, Tensor]:
        """One step on this process's share of the images; gradients are averaged over the processes."""
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
        self.update((1.0 if early else cfg.dense_weight) * dense + mask, processes)
        return {**terms, **more}

    def averaged(self, model_cfg: Mapping[str, Any]) -> torch.nn.Module:
        """A copy of the model with the averaged weights, in evaluation mode."""
        sam = build_sam(model_cfg, checkpoint=False)
        sam.load_state_dict(self.average)
        return sam.to(next(self.model.parameters()).device)
