#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw what makes a SAM hard to quantize, as figures 1, 4 and 6 of the AHCQ-SAM paper do.

Example: python tools/plot_distributions.py --coco COCO_FOLDER --out docs/results
"""

import argparse
import json
from itertools import islice

from ahcq_plugin.ptq.paper_figures import draw
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam_tiny", help="sam_tiny, vit_b, vit_l or vit_h")
    parser.add_argument("--weights", help="state_dict; default: the packaged weights of sam_tiny")
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--boxes", type=int, default=16, help="at most so many boxes an image")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="docs/results", help="folder for figure1.png and channels.png")
    args = parser.parse_args()
    sam = build_sam(args.model, args.weights).to(args.device)
    items = coco_items(args.coco) if args.coco else scene_items(size=sam.image_encoder.img_size)
    batches = [make_batch(sam, item.image, item.boxes[: args.boxes]) for item in islice(items, args.images)]
    print(json.dumps(draw(sam, batches, args.out, args.bits, box_forward), indent=1))


if __name__ == "__main__":
    main()
