# SPDX-License-Identifier: Apache-2.0
"""The training loop: one or more processes, checkpoints that resume exactly, an average of the weights."""

from __future__ import annotations

import ctypes
import json
import logging
import math
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

from ahcq_plugin.zoo.sam import build_sam
from ahcq_plugin.zoo.training.init import init_sam
from ahcq_plugin.zoo.training.losses import DenseHead, dense_loss, mask_loss
from ahcq_plugin.zoo.training.optim import Muon
from ahcq_plugin.zoo.training.pool import Level, load_pool
from ahcq_plugin.zoo.training.samples import SampleCfg, make_sample
from ahcq_plugin.zoo.training.validate import held_out_iou

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainCfg:
    """Everything that decides the result of a run, together with the model's config and the images."""

    steps: int = 24000
    batch: int = 2  # images a step, over all processes
    lr: float = 2e-3
    warmup: int = 100  # steps
    decay_share: float = 0.35  # last share of the steps: the learning rate falls to zero, more real images
    detach_steps: int = 400  # first steps: the decoder learns to draw boxes without steering the encoder
    dense_weight: float = 0.6  # of the dense losses once the decoder steers the encoder
    late_scene_share: float = 0.4  # of samples, in the last part
    weight_decay: float = 0.03
    clip: float = 1.0
    average: float = 0.998  # decay of the average of the weights, per step
    seed: int = 1
    sample: SampleCfg = SampleCfg()

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"`decay_share` must be in (0, 1], got {self.decay_share!r}")

    @property
    def decay_start(self) -> int:
        """First step of the last part."""
        return min(self.steps - 1, round(self.steps * (1 - self.decay_share)))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, half a cosine to zero."""
        late = max(0, step - self.decay_start) / (self.steps - self.decay_start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * late))


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
    _keep_freed_memory()
    pool, held = load_pool(coco) if coco else ([], [])
    sam = init_sam(model_cfg, cfg.seed).to(device)
    head = DenseHead(model_cfg["prompt_embed_dim"]).to(device)
    run = _Run(sam, head, cfg)
    state_file = out_dir / "state.pth"
    if resume and state_file.is_file():
        run.load(torch.load(state_file, map_location=device, weights_only=True))
        logger.info("resumed at step %d of %d", run.step, cfg.steps)
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
            _save(run.state(), state_file)
            saved = time.monotonic()
        if run.step % check_every == 0:
            logger.info("held out: %s", held_out_iou(run.averaged(model_cfg), coco, held))
    if rank == 0:
        _save(run.state(), state_file)
        _save({k: v.half() for k, v in run.average.items()}, out_dir / "model.pth")
        facts = {"model": model_cfg, "training": asdict(cfg), "real_images": len(pool), "held_out_images": held}
        (out_dir / "model.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


class _Run:
    """What a checkpoint holds: model, dense head, optimizer, average of the weights and the step."""

    def __init__(self, sam: torch.nn.Module, head: DenseHead, cfg: TrainCfg) -> None:
        self.sam, self.head, self.cfg, self.step = sam, head, cfg, 0
        prompt = [p for module in (sam.prompt_encoder, sam.mask_decoder) for p in module.parameters()]
        self.parts = [[*sam.image_encoder.parameters(), *head.parameters()], prompt]
        every = [*sam.named_parameters(), *head.named_parameters()]
        # embeddings and position tables are matrices in form only
        matrices = [
            p for name, p in every if p.ndim >= 2 and not any(word in name for word in ("rel_pos", "embed", "token"))
        ]
        rest = [p for _, p in every if all(p is not m for m in matrices)]
        self.optimizers = [
            Muon(matrices, cfg.lr, cfg.weight_decay),
            torch.optim.AdamW(rest, cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        ]
        self.average = {k: v.clone() for k, v in sam.state_dict().items()}

    def advance(self, batch: Mapping[str, Tensor], processes: int) -> dict[str, Tensor]:
        """One step on this process's share of the images; gradients are averaged over the processes."""
        cfg, sam = self.cfg, self.sam
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
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        ((1.0 if early else cfg.dense_weight) * dense + mask).backward()
        if processes > 1:
            grads = [p.grad for part in self.parts for p in part if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(grads, (flat / processes).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
        for part in self.parts:  # apart: the decoder's gradients are larger and would shrink the encoder's
            torch.nn.utils.clip_grad_norm_(part, cfg.clip, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate(self.step) * (1.0 if isinstance(optimizer, Muon) else 0.5)
            optimizer.step()
        self.step += 1
        keep = min(cfg.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(sam.state_dict().values()), 1 - keep)
        return {**terms, **more}

    def averaged(self, model_cfg: Mapping[str, Any]) -> torch.nn.Module:
        """A copy of the model with the averaged weights, in evaluation mode."""
        sam = build_sam(model_cfg, checkpoint=False)
        sam.load_state_dict(self.average)
        return sam.to(next(self.sam.parameters()).device)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.sam.state_dict(),
            "average": self.average,
            "head": self.head.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "config": asdict(self.cfg),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        if state["step"] > self.cfg.steps:
            raise ValueError(f"the saved state is at step {state['step']}, beyond `steps` = {self.cfg.steps}")
        self.sam.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = dict(state["average"])
        self.step = state["step"]


def _save(value: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    torch.save(value, partial)
    partial.replace(path)


def _keep_freed_memory() -> None:
    """Ask glibc not to give freed blocks back to the system: fetching large tensors anew costs a tenth of a step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped apart
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        logger.debug("mallopt is not available")
