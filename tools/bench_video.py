# SPDX-License-Identifier: Apache-2.0
"""Seconds per tracked frame and peak memory of SAM 2, in floating point and with fake quantization.

    python tools/bench_video.py [--models sam2_tiny sam2.1_t] [--size 256] [--frames 8] [--objects 1] [--device cuda]

Weights are random but those of sam2_tiny; the clip is noise. The first frame, whose masks are given, is not counted.
CPU seconds are the process's own, which other load on the machine lengthens less. The peak is the allocator's on CUDA,
the resident size of the whole process on the CPU.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from ahcq_plugin.ptq import Recipe, calibrate, freeze, prepare
from ahcq_plugin.support.arguments import at_least_one, box_count, usable_device
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.tool import importing, run_tool

with importing("sam2"):
    from ahcq_plugin.zoo.sam2 import PUBLISHED, build_sam2
    from ahcq_plugin.zoo.track import clip_forward, track


def make_clip(size: int, frames: int, objects: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for number, mask in enumerate(masks):
        mask[size // 4 : size // 2, size // 8 * number : size // 8 * number + size // 4] = True
    return {"frames": torch.randn(frames, 3, size, size, generator=generator), "masks": masks}


def measure(model: nn.Module, clip: dict[str, Tensor]) -> tuple[float, float, float]:
    """(seconds per tracked frame, CPU seconds per tracked frame, peak in GB)."""
    stages, device = Stopwatch(), next(model.parameters()).device
    list(track(model, clip["frames"][:2], clip["masks"]))  # warm-up
    with stages("track", device):
        run = track(model, clip["frames"], clip["masks"])
        next(run)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        tracked = len(list(run))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return seconds / tracked, cpu / tracked, stages.records["track"]["peak_bytes"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["sam2_tiny", *PUBLISHED], default=["sam2_tiny", "sam2.1_t"])
    parser.add_argument("--recipes", nargs="+", choices=Recipe.names(), default=["rtn", "ahcq"])
    parser.add_argument("--size", type=at_least_one, default=256, help="of the published models' input")
    parser.add_argument("--frames", type=at_least_one, default=8)
    parser.add_argument("--objects", type=box_count, default=1)
    parser.add_argument("--device", type=usable_device, default="cpu")
    options = parser.parse_args()
    print(f"{'model':12}{'input':>7}{'computes':>11}{'s/frame':>10}{'CPU s':>10}{'peak GB':>10}")
    for name in options.models:
        for recipe in ("", *options.recipes):
            torch.manual_seed(0)
            config = name if name == "sam2_tiny" else {"name": name, "image_size": options.size}
            model = build_sam2(config, None if name == "sam2_tiny" else False).to(options.device)
            clip = make_clip(model.image_size, options.frames, options.objects)
            if recipe:
                prepare(model, Recipe.from_config(recipe))
                short = {"frames": clip["frames"][:2].to(options.device), "masks": clip["masks"]}
                calibrate(model, [short], clip_forward, progress=False)
                freeze(model)
            seconds, cpu, peak = measure(model, clip)
            print(
                f"{name:12}{model.image_size:7}{recipe or 'FP':>11}{seconds:10.3f}{cpu:10.3f}{peak:10.2f}", flush=True
            )


if __name__ == "__main__":
    run_tool(main)
