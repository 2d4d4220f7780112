#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small Segment Anything model from nothing on a CPU or a GPU. See docs/sam_tiny.md."""

import argparse
import dataclasses
import logging

from ahcq_plugin.studies.training.arguments import add_training_arguments, scheduled
from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.studies.training.loop import TrainCfg, train
from ahcq_plugin.studies.training.models import MODELS
from ahcq_plugin.support.arguments import thread_count
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
    parser.add_argument("--model", default="sam_tiny", choices=sorted(MODELS))
    parser.add_argument("--processes", type=thread_count, default=1, help="CPU processes of one thread each")
    defaults = TrainCfg()
    add_training_arguments(parser, defaults, "samples")
    args = parser.parse_args()
    configure_logging(0)
    model = MODELS[args.model]
    size = model["image_size"]
    sample = dataclasses.replace(defaults.sample, size=size, mask_size=4 * size // model["patch_size"])
    cfg = scheduled(defaults, args, sample=sample)
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
