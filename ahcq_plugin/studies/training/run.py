# SPDX-License-Identifier: Apache-2.0
"""What every training here shares: the schedule, one optimizer step, a state that resumes exactly, saved weights."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ahcq_plugin.studies.training.optim import Muon

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, from which seed."""

    steps: int = 24000
    batch: int = 2  # samples a step, over all processes
    lr: float = 2e-3
    warmup: int = 100  # steps
    decay_share: float = 0.35  # last share of the steps, in which the learning rate falls to zero
    weight_decay: float = 0.03
    clip: float = 1.0
    average: float = 0.998  # decay of the average of the weights, per step
    seed: int = 1

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


class Run:
    """What a checkpoint holds: model, heads of auxiliary losses, optimizers, average of the weights and the step.

    Args:
        parts: lists of parameters whose gradients are clipped apart.
        matrices: parameters that Muon updates; AdamW takes the rest of ``model`` and ``head``.
        processes: that take part; gradients are averaged over them.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        parts: list[list[Tensor]],
        matrices: list[Tensor],
        cfg: Schedule,
        processes: int = 1,
    ) -> None:
        self.model, self.head, self.parts, self.cfg, self.processes = model, head, parts, cfg, processes
        self.step = 0
        taken = {id(p) for p in matrices}
        rest = [p for p in (*model.parameters(), *head.parameters()) if id(p) not in taken]
        self.optimizers = [
            Muon(matrices, cfg.lr, cfg.weight_decay),
            torch.optim.AdamW(rest, cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        ]
        self.average = {k: v.clone() for k, v in model.state_dict().items()}

    def advance(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step on this process's share of the samples; returns terms of the loss, detached."""
        raise NotImplementedError

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of ``loss``, averaged over the processes."""
        cfg, processes = self.cfg, self.processes
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if processes > 1:
            grads = [p.grad for part in self.parts for p in part if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(grads, (flat / processes).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
        for part in self.parts:
            torch.nn.utils.clip_grad_norm_(part, cfg.clip, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate(self.step) * (1.0 if isinstance(optimizer, Muon) else 0.5)
            optimizer.step()
        self.step += 1
        keep = min(cfg.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - keep)

    def averaged(self) -> nn.Module:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average)
        return model.eval()

    def state(self) -> dict[str, Any]:
        """What ``load`` goes on from."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "head": self.head.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "config": asdict(self.cfg),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises: ValueError: it is beyond the last step."""
        if state["step"] > self.cfg.steps:
            raise ValueError(f"the saved state is at step {state['step']}, beyond `steps` = {self.cfg.steps}")
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = dict(state["average"])
        self.step = state["step"]
        logger.info("resumed at step %d of %d", self.step, self.cfg.steps)


def keep_freed_memory() -> None:
    """Ask glibc not to give freed blocks back to the system: fetching large tensors anew costs a tenth of a step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped apart
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        logger.debug("mallopt is not available")
