#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What makes a SAM hard to quantize: condition numbers, post-GELU and post-softmax values, channel ranges."""

import argparse
import json
from itertools import islice

from ahcq_plugin.studies.evaluation.report import statistics_tables
from ahcq_plugin.studies.evaluation.stats import activation_statistics
from ahcq_plugin.studies.tensors import condition_numbers
from ahcq_plugin.support.arguments import at_least_one, usable_device, writable_folder
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.sam import build_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_l or vit_h")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--images", type=at_least_one, default=16)
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument(
        "--out", type=writable_folder, required=True, help="folder for statistics.json and statistics.md"
    )
    args = parser.parse_args()
    sam = build_sam(args.model, args.weights).to(args.device)
    items = coco_items(args.coco) if args.coco else scene_items(size=sam.image_encoder.img_size)
    conditions = condition_numbers(sam)
    activations = activation_statistics(sam, islice(items, args.images))
    write_text(json.dumps({"conditions": conditions, **activations}, indent=1) + "\n", args.out / "statistics.json")
    tables = statistics_tables(conditions, activations)
    write_text(tables, args.out / "statistics.md")
    print(tables)


if __name__ == "__main__":
    run_tool(main)
