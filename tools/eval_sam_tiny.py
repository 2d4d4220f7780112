#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure a small SAM: mean IoU, dependence on the image, mask AP, round-to-nearest weights. See docs/sam_tiny.md."""

import argparse
import json
import logging

from ahcq_plugin.studies.evaluation.report import evaluate, evaluation_tables
from ahcq_plugin.studies.training.models import MODELS
from ahcq_plugin.support.arguments import usable_device, writable_folder
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import build_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coco", help="COCO folder to measure on as well; with yolox_nano_bbox.json, with its boxes")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--model", choices=sorted(MODELS), help="configuration of --weights; default: the packaged one")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument(
        "--out", type=writable_folder, required=True, help="folder for evaluation.json and evaluation.md"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sam = build_sam(MODELS[args.model] if args.model else "sam_tiny", args.weights).to(args.device)
    result = evaluate(sam, args.coco)
    write_text(json.dumps(result, indent=1) + "\n", args.out / "evaluation.json")
    tables = evaluation_tables(result)
    write_text(tables, args.out / "evaluation.md")
    print(tables)


if __name__ == "__main__":
    run_tool(main)
