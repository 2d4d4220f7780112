# SPDX-License-Identifier: Apache-2.0
"""How a run is carried out: where it reads and writes, the loop over its steps, its log, the files it leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ahcq_plugin.studies.training.run import Run
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.safe_load import safe_load

logger = logging.getLogger(__name__)
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Job:
    """Files and machine of a run. Of these, only ``coco``, ``extra`` and ``processes`` change its result.

    Args:
        out_dir: folder for ``state.pth``, ``model.pth`` and ``model.json``; made when absent.
        coco: COCO folder with real images, of which some are held out; None: generated ones alone.
        extra: further COCO folders, each with the weight of its images against those of ``coco``.
        processes: on a CPU, processes of one thread each that share the samples of a step.
        workers: processes that make samples, for each of them; 0: made in place.
        resume: go on from ``out_dir/state.pth`` when it is there.
        save_seconds: how often the state is saved.
        check_every: steps between two measurements on held-out data.
        on_start: called with its rank in every process that the training starts, before anything else: logging is set
            up there. It must be importable from its module.
    """

    out_dir: str | Path
    coco: str | Path | None = None
    extra: tuple[tuple[str | Path, float], ...] = ()
    processes: int = 1
    workers: int = 0
    device: str = "cpu"
    resume: bool = False
    save_seconds: float = 180
    check_every: int = 400
    on_start: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.processes > 1 and self.device != "cpu":
            raise ValueError(f"`processes` above 1 are for the CPU, got device {self.device!r}")

    @property
    def state_file(self) -> Path:
        """What a run is resumed from."""
        return Path(self.out_dir) / "state.pth"

    @property
    def weights_file(self) -> Path:
        """The averaged weights, fp16; beside it a JSON file says how they were made."""
        return Path(self.out_dir) / "model.pth"


def go_on(run: Run, job: Job) -> None:
    """With ``job.resume``, take ``run`` to the saved state where there is one.

    Raises:
        ValueError: the file is damaged, of another run, or beyond the last step.
    """
    if job.resume and job.state_file.is_file():
        with blaming(f"{job.state_file} is not the state of such a run", "remove it, or start without --resume"):
            run.load(safe_load(job.state_file, job.device))


def carry_out(
    run: Run, samples: Dataset, job: Job, measure: Callable[[nn.Module], Mapping[str, float]], rank: int = 0
) -> None:
    """Take ``run`` to its last step, from the saved state with ``job.resume``.

    Args:
        samples: step s takes the samples s * batch up to (s + 1) * batch; each process its share of them.
        measure: figures of the averaged model on held-out data.
        rank: of this process; the first one logs, measures and saves.
    """
    go_on(run, job)
    cfg, local = run.cfg, run.cfg.batch // job.processes
    shares = [[step * cfg.batch + rank * local + i for i in range(local)] for step in range(run.step, cfg.steps)]
    log, saved = _Log(run), time.monotonic()
    for batch in DataLoader(samples, batch_sampler=shares, num_workers=job.workers):
        torch.manual_seed((cfg.seed * 1_000_003 + run.step) * job.processes + rank)
        terms = run.advance({name: value.to(job.device) for name, value in batch.items()})
        if rank:
            continue
        log.add(terms)
        if time.monotonic() - saved > job.save_seconds:
            save_checked(run.state(), job.state_file)
            saved = time.monotonic()
        if run.step % job.check_every == 0:
            logger.info("held out: %s", measure(run.averaged()))


def write_result(run: Run, job: Job, model_cfg: Mapping[str, Any], real_images: int, held_out: list[int]) -> None:
    """The last state, the averaged weights in half precision, and what they are and were trained on."""
    save_checked(run.state(), job.state_file)
    save_checked({name: value.half() for name, value in run.average.items()}, job.weights_file)
    facts = {
        "model": dict(model_cfg),
        "training": asdict(run.cfg),
        "real_images": real_images,
        "extra": {Path(folder).name: weight for folder, weight in job.extra},
        "held_out_images": held_out,
    }
    write_json(facts, job.weights_file.with_suffix(".json"), indent=1)


class _Log:
    """Means of the terms of the loss since the last line, every :data:`LOG_EVERY` steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.first, self.since = run, run.step, time.monotonic()
        self.totals: dict[str, float] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)
        step = self.run.step
        if step % LOG_EVERY:
            return
        steps = step - self.first
        logger.info(
            "step %d lr %.1e %s s/step %.2f",
            step,
            self.run.cfg.learning_rate(step - 1),
            " ".join(f"{name} {total / steps:.4f}" for name, total in self.totals.items()),
            (time.monotonic() - self.since) / steps,
        )
        self.first, self.since, self.totals = step, time.monotonic(), {}
