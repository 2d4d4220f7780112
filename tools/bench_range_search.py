# SPDX-License-Identifier: Apache-2.0
"""Time and quality of the range search against trying its candidates one by one, on weights like those of ViT-B.

At 4 bits the reference runs in full; else 64 candidates are timed (~: extrapolated) and 16 channels compared.
    python tools/bench_range_search.py [--bits 4 6 8] [--shapes 768x768 3072x768] [--json result.json]
"""

import argparse
import itertools
import time

import torch

from ahcq_plugin.functional.range_search import range_error, search_range
from ahcq_plugin.studies.reference.range_search import search_one_by_one
from ahcq_plugin.support.arguments import bit_width, matrix_shape, writable_file
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.tool import run_tool

STEPS, TIMED, SAMPLE = 100, 64, 16


def weights(channels: int, values: int) -> torch.Tensor:
    """Gaussian rows; in 1 of 32 some values are 20 times larger; in 1 of 32 all have one sign."""
    generator = torch.Generator().manual_seed(0)
    x = 0.02 * torch.randn(channels, values, generator=generator)
    rows = torch.arange(channels)[:, None]
    outliers = (rows % 32 == 0) & (torch.rand(x.shape, generator=generator) < 0.003)
    return torch.where(rows % 32 == 1, x.abs(), torch.where(outliers, 20 * x, x))


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def measure(channels: int, values: int, bits: int) -> dict:
    x = weights(channels, values)
    ours, seconds = sorted((timed(search_range, x, bits) for _ in range(3)), key=lambda run: run[1])[1]  # the median
    search, full = search_one_by_one, bits == 4
    best, reference_seconds = timed(search, x, bits, first=None if full else TIMED)
    if not full:
        reference_seconds *= STEPS * 2**bits / TIMED
        x, ours = x[:SAMPLE], [end[:SAMPLE] for end in ours]
        best = search(x, bits)
    error, reference_error = (range_error(x.double(), *ends, bits) for ends in (ours, best))
    return {
        "shape": f"{channels}x{values}",
        "bits": bits,
        "reference_s": reference_seconds,
        "extrapolated": not full,
        "ours_s": seconds,
        "speedup": reference_seconds / seconds,
        "max_error_ratio": float((error / reference_error).max()),
        "share_lower": float((error < reference_error).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=bit_width, nargs="+", default=[4])
    parser.add_argument("--shapes", nargs="+", type=matrix_shape, default=[(768, 768), (768, 3072), (3072, 768)])
    parser.add_argument("--json", type=writable_file, help="file for the rows")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("shape      bits  reference s    ours s  ratio  max error64 ratio  channels lower")
    rows = []
    for bits, shape in itertools.product(args.bits, args.shapes):
        rows.append(row := measure(*shape, bits))
        seconds = f"{'~' if row['extrapolated'] else ''}{row['reference_s']:.2f}"
        size = "x".join(map(str, shape))
        print(f"{size:10} {bits:4d} {seconds:>12} {row['ours_s']:9.3f} {row['speedup']:5.0f}x", end="")
        print(f" {row['max_error_ratio']:18.9f} {row['share_lower']:14.1%}", flush=True)
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    run_tool(main)
