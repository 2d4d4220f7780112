# SPDX-License-Identifier: Apache-2.0
"""Three ways to group the channels of CAG, and inputs to compare them on (tools/compare_cag_clustering.py).

raw: k-means of (scale, zero point), as in the public code; ends: k-means of range ends in the data's units, weighted by
importance; error: the grouping of least modelled error that the package uses, from quantiles of every channel.
`channel` is one group per channel.
Inputs: those of sam_tiny, and synthetic ones with offset channels and outlier channels 10 to 100 times as wide.
"""

from collections import defaultdict

import torch
from sklearn.cluster import KMeans

from ahcq_plugin.functional import grouping, uniform
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.quantizers import CAGFakeQuantize
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam

ROWS = 512  # tokens kept of an image
WAYS = ("raw", "ends", "error")


@torch.no_grad()
def sam_inputs(items, calibration):
    """(part, lo, hi, points, rows, weight) of every qkv_in and mlp_in: rows of other items than those calibrated on."""
    sam = build_sam("sam_tiny")
    batches = [make_batch(sam, item.image, item.boxes[:8]) for item in items]
    prepare(sam, Recipe.from_config("rtn", cag=True))
    calibrate_activations(sam, batches[:calibration], box_forward)
    sites = {name: q for name, q in sam.named_modules() if isinstance(q, CAGFakeQuantize)}
    rows = defaultdict(list)

    def keep(name, x):
        x = x.flatten(0, -2)
        rows[name].append(x[:: -(-len(x) // ROWS)])

    with watched(sites, lambda name, _, x, out: keep(name, x)):
        for batch in batches[calibration:]:
            box_forward(sam, batch)
    for name, q in sites.items():
        weight = torch.cat([layer.weight for layer in q.consumers])
        observer = q.activation_post_process
        yield name.split(".")[0], observer.min_val, observer.max_val, q.points, torch.cat(rows[name]), weight


def synthetic_inputs(channels=256):
    """Normal values; one channel in 32 has an offset of 10 to 100 times its width, or such a width."""
    for seed in range(4):
        torch.manual_seed(seed)
        width = torch.exp(0.4 * torch.randn(channels))
        offset, factor = width * torch.randn(channels), 10 ** (1 + torch.rand(channels))
        offset[::64] *= factor[::64]
        width[32::64] *= factor[32::64]
        x = torch.randn(12, ROWS, channels) * width + offset
        lo, hi = x[:8].amin(1).mean(0), x[:8].amax(1).mean(0)
        points = grouping.describe_channels(x[:8].flatten(0, 1), lo, hi)
        yield "synthetic", lo, hi, points, x[8:].flatten(0, 1), torch.randn(64, channels)


def grouped(way, lo, hi, points, weights, count, bits):
    """Parameters of every channel."""
    if way == "error":
        labels, params = grouping.cluster(points, weights, count, bits)
        return uniform.UniformParams(params.scale[labels], params.zero_point[labels])
    params = uniform.qparams_from_range(lo, hi, bits)
    raw = way == "raw"
    points = (params.scale, params.zero_point) if raw else (lo.clamp(max=0), hi.clamp(min=0))
    means = KMeans(count, random_state=0, n_init=1 if raw else 4)
    means.fit(torch.stack(points, 1).double().numpy(), sample_weight=None if raw else weights.numpy())
    first, second = torch.from_numpy(means.cluster_centers_[means.labels_]).float().T
    return uniform.UniformParams(first, second.round()) if raw else uniform.qparams_from_range(first, second, bits)
