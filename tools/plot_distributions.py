#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw what makes a SAM hard to quantize, as figures 1, 4 and 6 of the AHCQ-SAM paper do, what ACNR does to the layers
that it changes, and what each family loses.

Example: python tools/plot_distributions.py --coco COCO_FOLDER --out docs/results
"""

import argparse
import json
from itertools import islice

from ahcq_plugin.studies.conditioning_errors import draw_conditioning
from ahcq_plugin.studies.family_errors import draw_families
from ahcq_plugin.studies.paper_figures import draw
from ahcq_plugin.support.arguments import at_least_one, bit_width, box_count, usable_device, writable_folder
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_l or vit_h")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--images", type=at_least_one, default=16)
    parser.add_argument("--boxes", type=box_count, default=16, help="at most so many boxes an image")
    parser.add_argument("--bits", type=bit_width, default=4)
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--out", type=writable_folder, default="docs/results", help="folder for the pictures")
    args = parser.parse_args()
    sam, again = (build_sam(args.model, args.weights).to(args.device) for _ in range(2))
    items = coco_items(args.coco) if args.coco else scene_items(size=sam.image_encoder.img_size)
    batches = [make_batch(sam, item.image, item.boxes[: args.boxes]) for item in islice(items, args.images)]
    figures = draw(sam, batches, args.out, args.bits, box_forward)
    figures |= draw_conditioning(sam, batches, args.out, box_forward)
    figures |= draw_families(again, batches, args.out, args.bits, box_forward)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_tool(main)
