#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""IoU of a SAM's masks to its floating-point masks with one role quantized at a time, without reconstruction.

Example: python tools/role_sensitivity.py --coco COCO_FOLDER --recipe ahcq
"""

import argparse
from itertools import islice

from torch import Tensor

from ahcq_plugin.export.compare import mask_overlap
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies.sensitivity import role_sensitivity
from ahcq_plugin.support.arguments import at_least_one, bit_width, box_count, usable_device
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_l or vit_h")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--recipe", default="ahcq", choices=Recipe.names())
    parser.add_argument("--bits", type=bit_width, default=4)
    parser.add_argument("--calibration", type=at_least_one, default=16, help="images; the next are compared")
    parser.add_argument("--images", type=at_least_one, default=32)
    parser.add_argument("--boxes", type=box_count, default=16, help="at most so many boxes an image")
    parser.add_argument("--device", type=usable_device, default="cpu")
    args = parser.parse_args()
    sam = build_sam(args.model, args.weights).to(args.device)
    source = coco_items(args.coco) if args.coco else scene_items(size=sam.image_encoder.img_size)
    items = islice(source, args.calibration + args.images)
    batches = [make_batch(sam, item.image, item.boxes[: args.boxes]) for item in items]
    recipe = Recipe.from_config(args.recipe, w_bits=args.bits, a_bits=args.bits)
    calibration, held_out = batches[: args.calibration], batches[args.calibration :]
    if not held_out:
        parser.error(
            f"no image is left to compare: got {len(batches)}, of which --calibration takes {args.calibration}"
        )

    def agreement(out: tuple, reference: tuple) -> Tensor:
        return mask_overlap(reference[0], out[0])[0]

    for group, iou in role_sensitivity(sam, calibration, held_out, recipe, agreement, box_forward).items():
        print(f"| {group} | {iou:.3f} |")


if __name__ == "__main__":
    run_tool(main)
