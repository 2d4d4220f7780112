#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Size of a quantized SAM's file, and the time of an image on integers beside floating point, measured in turn."""

import argparse
from pathlib import Path

import torch

from ahcq_plugin import load_quantized
from ahcq_plugin.integer import to_integer
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.studies.inference.timing import in_turn, sam_parts
from ahcq_plugin.support.arguments import at_least_one, box_count, thread_count
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.rebuild import rebuild_from_state


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="quantized.safetensors or quantized.pth of a SAM (not SAM 2)")
    parser.add_argument("--boxes", type=box_count, default=4, help="masks of the image")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--threads", type=thread_count, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quantized = load_quantized(args.checkpoint)
    floating = rebuild_from_state(quantized.state_dict())
    models = {"FP32": floating, "fake-quantized": quantized, "integers": to_integer(quantized)}
    weights = sum(p.numel() for p in floating.parameters()) * 4
    size = Path(args.checkpoint).stat().st_size
    print(
        f"{args.checkpoint}: {size / 1e6:.2f} MB; FP32 weights {weights / 1e6:.2f} MB, {weights / size:.1f} times that"
    )
    parts = {name: sam_parts(model, args.boxes) for name, model in models.items()}
    calls = {name: lambda p=p: (p["encoder"](), p["decoder"]()) for name, p in parts.items()}
    times = in_turn(calls, args.repeats)
    backend = backend_for(torch.zeros(1)).name
    print(f"an image with {args.boxes} boxes, {args.threads} thread(s), integers by the backend {backend}:")
    for name, t in times.items():
        ratio = times["FP32"].least / t.least
        print(f"  {name:15} {t.least * 1e3:8.1f} ms (median {t.median * 1e3:.1f}), {ratio:.2f} times as fast as FP32")
    return 0


if __name__ == "__main__":
    run_tool(main)
