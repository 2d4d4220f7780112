#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small SAM 2 from nothing on generated clips, on a CPU or a GPU. See docs/sam2_tiny.md."""

import argparse
import dataclasses
import logging

import torch

from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.support.arguments import (
    at_least_one,
    at_least_zero,
    positive,
    thread_count,
    usable_device,
    worker_count,
    writable_folder,
)
from ahcq_plugin.support.tool import importing, run_tool

with importing("sam2"):
    from ahcq_plugin.studies.training.clip_loop import SAM2_TINY, ClipTrainCfg, train_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--coco", help="COCO folder with instances.json and images/: backgrounds and cut-outs")
    data.add_argument("--scenes-only", action="store_true", help="generated shapes only; needs no data")
    parser.add_argument("--out", type=writable_folder, required=True, help="folder for state.pth and model.pth")
    parser.add_argument("--workers", type=worker_count, default=0, help="processes that make clips (with a GPU)")
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pth")
    defaults = ClipTrainCfg()
    for name, kind in {"steps": at_least_one, "batch": at_least_one, "lr": positive, "seed": at_least_zero}.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    cfg = dataclasses.replace(defaults, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    job = Job(args.out, args.coco, workers=args.workers, device=args.device, resume=args.resume)
    print(train_clips(SAM2_TINY, cfg, job))


if __name__ == "__main__":
    run_tool(main)
