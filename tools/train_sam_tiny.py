#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small Segment Anything model from nothing on a CPU or a GPU. See docs/sam_tiny.md."""

import argparse
import dataclasses
import logging

from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.studies.training.loop import TrainCfg, train
from ahcq_plugin.studies.training.models import MODELS
from ahcq_plugin.support.arguments import (
    at_least_one,
    at_least_zero,
    positive,
    thread_count,
    usable_device,
    worker_count,
    writable_folder,
)
from ahcq_plugin.support.tool import run_tool


def configure_logging(rank: int) -> None:
    """For each of the processes: the first one reports."""
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(asctime)s %(message)s")


def folder(text: str) -> tuple[str, float]:
    """FOLDER=WEIGHT; the weight is 1 where none is given."""
    path, _, weight = text.partition("=")
    return path, float(weight or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--coco", help="COCO folder with instances.json and images/")
    data.add_argument("--scenes-only", action="store_true", help="generated scenes only; needs no data")
    parser.add_argument(
        "--extra",
        nargs="*",
        default=[],
        type=folder,
        metavar="FOLDER=WEIGHT",
        help="more COCO folders",
    )
    parser.add_argument("--out", type=writable_folder, required=True, help="folder for state.pth and model.pth")
    parser.add_argument("--model", default="sam_tiny", choices=sorted(MODELS))
    parser.add_argument("--processes", type=thread_count, default=1, help="CPU processes of one thread each")
    parser.add_argument("--workers", type=worker_count, default=0, help="processes that make samples (with a GPU)")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pth")
    defaults = TrainCfg()
    for name, kind in {"steps": at_least_one, "batch": at_least_one, "lr": positive, "seed": at_least_zero}.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    args = parser.parse_args()
    configure_logging(0)
    model = MODELS[args.model]
    size = model["image_size"]
    sample = dataclasses.replace(defaults.sample, size=size, mask_size=4 * size // model["patch_size"])
    cfg = dataclasses.replace(defaults, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, sample=sample)
    if args.extra and not args.coco:
        parser.error("--extra needs --coco, the folder of which images are held out")
    job = Job(
        args.out,
        args.coco,
        tuple(args.extra),
        args.processes,
        args.workers,
        args.device,
        args.resume,
        on_start=configure_logging,
    )
    print(train(model, cfg, job))


if __name__ == "__main__":
    run_tool(main)
