#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Three ways to group the channels of CAG, by the relative error of the Linears behind them, nothing learned.

raw: k-means of (scale, zero point), as in the public code; ends: k-means of range ends in the data's units, weighted by
importance; error: the grouping of least modelled error that the package uses. `channel` is one group per channel.
Inputs: those of sam_tiny, and synthetic ones with offset channels and outlier channels 10 to 100 times as wide.
"""

import argparse
from collections import defaultdict
from itertools import islice

import torch
from sklearn.cluster import KMeans
from tqdm import tqdm

from ahcq_plugin.functional import grouping, uniform
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.quantizers import CAGFakeQuantize
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam

ROWS = 512  # tokens kept of an image
WAYS = ("raw", "ends", "error")


def sam_inputs(items, calibration):
    """(part, lo, hi, rows, weight) of every qkv_in and mlp_in: ranges of the first items, rows of the others."""
    sam = build_sam("sam_tiny")
    batches = [make_batch(sam, item.image, item.boxes[:8]) for item in items]
    prepare(sam, Recipe.from_config("rtn", cag=True))
    calibrate_activations(sam, batches[:calibration], box_forward)
    sites = {name: q for name, q in sam.named_modules() if isinstance(q, CAGFakeQuantize)}
    rows = defaultdict(list)

    def keep(name, x):
        x = x.flatten(0, -2)
        rows[name].append(x[:: -(-len(x) // ROWS)])

    for name, q in sites.items():
        q.register_forward_pre_hook(lambda _, x, name=name: keep(name, x[0]))
    for batch in batches[calibration:]:
        box_forward(sam, batch)
    for name, q in sites.items():
        weight = torch.cat([layer.weight for layer in q.consumers])
        observer = q.activation_post_process
        yield name.split(".")[0], observer.min_val, observer.max_val, torch.cat(rows[name]), weight


def synthetic_inputs(channels=256):
    """Normal values; one channel in 32 has an offset of 10 to 100 times its width, or such a width."""
    for seed in range(4):
        torch.manual_seed(seed)
        width = torch.exp(0.4 * torch.randn(channels))
        offset, factor = width * torch.randn(channels), 10 ** (1 + torch.rand(channels))
        offset[::64] *= factor[::64]
        width[32::64] *= factor[32::64]
        x = torch.randn(12, ROWS, channels) * width + offset
        yield "synthetic", x[:8].amin(1).mean(0), x[:8].amax(1).mean(0), x[8:].flatten(0, 1), torch.randn(64, channels)


def grouped(way, lo, hi, weights, count, bits):
    """Parameters of every channel."""
    params = uniform.qparams_from_range(lo, hi, bits)
    if way == "error":
        labels, params = grouping.cluster(params, weights, count, bits)
        return uniform.UniformParams(params.scale[labels], params.zero_point[labels])
    raw = way == "raw"
    points = (params.scale, params.zero_point) if raw else (lo.clamp(max=0), hi.clamp(min=0))
    means = KMeans(count, random_state=0, n_init=1 if raw else 4)
    means.fit(torch.stack(points, 1).double().numpy(), sample_weight=None if raw else weights.numpy())
    first, second = torch.from_numpy(means.cluster_centers_[means.labels_]).float().T
    return uniform.UniformParams(first, second.round()) if raw else uniform.qparams_from_range(first, second, bits)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--coco", help="COCO folder to take images from; default: generated scenes")
    parser.add_argument("--images", type=int, default=12, help="two thirds calibrate, the others are measured")
    args = parser.parse_args()
    items = list(islice(coco_items(args.coco) if args.coco else scene_items(), args.images))
    sites = [*sam_inputs(items, args.images * 2 // 3), *synthetic_inputs()]
    errors = defaultdict(list)
    for part, lo, hi, x, weight in tqdm(sites, unit="input"):
        importance, gram = weight.square().sum(0), weight.T @ weight
        for bits in args.bits:
            tried = {(w, n): grouped(w, lo, hi, importance, n, bits) for w in WAYS for n in args.groups}
            tried["channel", 0] = uniform.qparams_from_range(lo, hi, bits)
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
    main()
