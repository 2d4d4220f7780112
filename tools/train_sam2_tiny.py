#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train a small SAM 2 from nothing on generated clips, on a CPU or a GPU. See docs/sam2_tiny.md."""

import argparse
import logging

import torch

from ahcq_plugin.studies.training.arguments import add_training_arguments, scheduled
from ahcq_plugin.studies.training.job import Job
from ahcq_plugin.support.arguments import thread_count
from ahcq_plugin.support.tool import importing, run_tool

with importing("sam2"):
    from ahcq_plugin.studies.training.clip_loop import SAM2_TINY, ClipTrainCfg, train_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--coco", help="COCO folder with instances.json and images/: backgrounds and cut-outs")
    data.add_argument("--scenes-only", action="store_true", help="generated shapes only; needs no data")
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    defaults = ClipTrainCfg()
    add_training_arguments(parser, defaults, "clips")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    job = Job(args.out, args.coco, workers=args.workers, device=args.device, resume=args.resume)
    print(train_clips(SAM2_TINY, scheduled(defaults, args), job))


if __name__ == "__main__":
    run_tool(main)
