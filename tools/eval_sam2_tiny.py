#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure a small SAM 2 in floating point: J&F on generated clips and on DAVIS sequences, beside first masks kept.

See docs/sam2_tiny.md.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ptq.py

import torch

from ahcq_plugin.support.arguments import at_least_one, check_apart, usable_device, writable_file, writable_folder
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.tool import importing, run_tool
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.videos import DAVIS, read_videos, write_clips

with importing("mm"):
    from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
    from ahcq_plugin.mm.evaluation.video_evaluation import evaluate_videos, keep_first_masks
    from ahcq_plugin.zoo.sam2 import build_sam2

TEST_SEED = 20260101  # of the clips; training and checks during it use other seeds
KEYS = ("J&F", "J", "F")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam2_tiny")
    parser.add_argument("--clips", type=at_least_one, default=32, help="generated clips of 12 frames")
    parser.add_argument("--davis", help="folder with JPEGImages/480p and Annotations/480p")
    parser.add_argument("--every", type=at_least_one, default=1, help="of DAVIS, use each so many frames one")
    parser.add_argument("--out", type=writable_file, help="JSON file for the figures")
    parser.add_argument(
        "--work-dir", type=writable_folder, default="work_dirs/clips", help="where the clips are written"
    )
    parser.add_argument("--device", type=usable_device, default="cpu")
    args = parser.parse_args()
    if args.out:
        check_apart(args.out, args.weights)
    if args.weights is None:
        model = build_sam2("sam2_tiny")
    else:
        model = build_sam2(packaged_config("sam2_tiny"), args.weights)
    model.to(torch.device(args.device))
    folder = write_clips(f"{args.work_dir}/test_{args.clips}", args.clips, TEST_SEED, size=model.image_size)
    groups = {f"{args.clips} generated clips": read_videos(folder, DAVIS)}
    if args.davis:
        groups |= {video.name: [video] for video in read_videos(args.davis, DAVIS, every=args.every)}
    figures = {}
    print("| | J&F | J | F | first masks kept: J&F | J | F | s/frame |\n" + "|---" * 8 + "|")
    for name, videos in groups.items():
        tracked = evaluate_videos(model, videos, JFMetric(), desc=name)
        kept = evaluate_videos(model, videos, JFMetric(), desc="kept", segment=keep_first_masks)
        figures[name] = {"model": tracked.metrics, "kept": kept.metrics, "seconds_per_frame": tracked.seconds_per_frame}
        cells = [f"{row.metrics[key]:.3f}" for row in (tracked, kept) for key in KEYS]
        print(f"| {name} | " + " | ".join([*cells, f"{tracked.seconds_per_frame:.3f}"]) + " |", flush=True)
    if args.out:
        write_json(figures, args.out)


if __name__ == "__main__":
    run_tool(main)
