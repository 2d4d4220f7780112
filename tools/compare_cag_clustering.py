# SPDX-License-Identifier: Apache-2.0
"""Ways to group the channels of CAG, by the relative error of the Linears behind them, nothing learned: `raw` k-means
of (scale, zero point), `ends` k-means of range ends, `error` ours (studies/reference/clusterings.py).

    python tools/compare_cag_clustering.py [--bits 4] [--coco FOLDER]
"""

import argparse
from collections import defaultdict
from itertools import islice

import torch
from tqdm import tqdm

from ahcq_plugin.functional import grouping, uniform
from ahcq_plugin.studies.reference import clusterings
from ahcq_plugin.support.arguments import at_least_one, bit_width, whole
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=bit_width, nargs="+", default=[4, 5, 6])
    parser.add_argument("--groups", type=at_least_one, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--images", type=whole(2), default=12, help="two thirds calibrate, the others are measured")
    args = parser.parse_args()
    items = list(islice(coco_items(args.coco) if args.coco else scene_items(), args.images))
    sites = [*clusterings.sam_inputs(items, args.images * 2 // 3), *clusterings.synthetic_inputs()]
    fewest = min(x.shape[-1] for *_, x, _ in sites)
    if max(args.groups) > fewest:
        raise ValueError(f"--groups: {max(args.groups)} groups of {fewest} channels; give at most as many")
    errors = defaultdict(list)
    for part, lo, hi, points, x, weight in tqdm(sites, unit="input"):
        importance, gram = weight.square().sum(0), weight.T @ weight
        for bits in args.bits:
            tried = {
                (w, n): clusterings.grouped(w, lo, hi, points, importance, n, bits)
                for w in clusterings.WAYS
                for n in args.groups
            }
            tried["channel", 0] = grouping.fit(points, bits)
            for key, params in tried.items():
                difference = uniform.fake_quantize(x, params, bits) - x
                error = (difference.T @ difference * gram).sum() / (x.T @ x * gram).sum()
                errors[part, bits, *key].append(error.log())
    print("relative error of the output in 1/1000, geometric mean over inputs")
    print(f"{'part':14} bits way     " + "".join(f"{n:5d} gr." for n in args.groups) + "  channel")
    for part, bits, way in dict.fromkeys(key[:3] for key in errors if key[2] != "channel"):
        cells = [errors[part, bits, way, n] for n in args.groups] + [errors[part, bits, "channel", 0]]
        print(f"{part:14} {bits:4} {way:6}" + "".join(f"{1000 * torch.stack(c).mean().exp():9.3f}" for c in cells))


if __name__ == "__main__":
    run_tool(main)
