#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Error of a SAM's mask logits by kind of prompt, calibrated with boxes only and with all kinds mixed.

Example: python tools/prompt_errors.py --calibrate COCO_TRAIN_FOLDER --coco COCO_VAL_FOLDER --bits 8 4
"""

import argparse
from itertools import islice

from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies.prompt_errors import prompt_errors
from ahcq_plugin.support.arguments import at_least_one, bit_width, box_count, usable_device
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items
from ahcq_plugin.zoo.prompts import KINDS
from ahcq_plugin.zoo.sam import build_sam

MIXES = {"boxes": {"box": 1.0}, "mixed": {"box": 0.25, "click1": 0.25, "click3": 0.125, "mask": 0.25, "grid": 0.125}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_l or vit_h")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--calibrate", required=True, help="COCO folder to calibrate on")
    parser.add_argument("--coco", required=True, help="COCO folder to compare on")
    parser.add_argument("--recipe", default="rtn", choices=Recipe.names())
    parser.add_argument("--bits", type=bit_width, nargs="+", default=[8, 4], help="of weights and activations")
    parser.add_argument("--images", type=at_least_one, default=32, help="in either folder")
    parser.add_argument("--objects", type=box_count, default=16, help="at most so many an image")
    parser.add_argument("--device", type=usable_device, default="cpu")
    args = parser.parse_args()
    sam = build_sam(args.model, args.weights).to(args.device)
    calibration, held_out = (list(islice(coco_items(folder), args.images)) for folder in (args.calibrate, args.coco))
    print(f"| calibrated with | bits | {' | '.join(KINDS)} |")
    for bits in args.bits:
        recipe = Recipe.from_config(args.recipe, w_bits=bits, a_bits=bits)
        for name, errors in prompt_errors(sam, MIXES, calibration, held_out, recipe, args.objects).items():
            print(f"| {name} | W{bits}A{bits} | {' | '.join(f'{errors[kind]:.4f}' for kind in KINDS)} |", flush=True)


if __name__ == "__main__":
    run_tool(main)
