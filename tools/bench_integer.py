# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of a SAM on integers beside floating point in PyTorch, measured in turn in one run.

    python tools/bench_integer.py [--model vit_b] [--recipes ahcq:4 rtn:8] [--boxes 16] [--repeats 3] [--threads 1]

Weights are random, quantizers guessed: neither changes what is computed. The peak is the resident size of the process
while one model is in memory.
"""

import argparse
import ctypes
import gc

import torch

from ahcq_plugin.integer import BACKENDS, to_integer, use_backend
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies.inference.timing import in_turn, quantized_by_guess, sam_parts
from ahcq_plugin.support.arguments import at_least_one, box_count, thread_count
from ahcq_plugin.support.stopwatch import Stopwatch
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import CHECKPOINTS, build_sam


def build(name: str, recipe: str | None) -> torch.nn.Module:
    torch.manual_seed(0)
    sam = build_sam(name, checkpoint=False)
    if recipe is None:
        return sam
    kind, bits = recipe.split(":")
    return to_integer(quantized_by_guess(sam, Recipe.from_config(kind, w_bits=int(bits), a_bits=int(bits))))


def peak(name: str, recipe: str | None, part: str, boxes: int) -> float:
    """GB while a part runs, with one model in memory."""
    gc.collect()
    call = sam_parts(build(name, recipe), boxes)[part]
    call()
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    watch = Stopwatch()
    with watch(part, torch.device("cpu")):
        call()
    return watch.records[part]["peak_bytes"] / 1e9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [f"{name}:{bits}" for name in Recipe.names() for bits in range(2, 9)]
    parser.add_argument("--model", default="vit_b", choices=["sam_tiny", *CHECKPOINTS])
    parser.add_argument("--recipes", nargs="+", default=["ahcq:4", "rtn:8"], choices=named)
    parser.add_argument("--boxes", type=box_count, default=16, help="of the decoder")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--threads", type=thread_count, default=1)
    parser.add_argument("--backend", choices=BACKENDS, help="default: the fastest that works here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = options.backend or backend_for(torch.zeros(1)).name
    print(f"{options.model}, {options.threads} thread(s), integers by the backend {backend}")
    recipes = [None, *options.recipes]
    print(f"{'part':10}{'computes':>12}{'min s':>9}{'median s':>10}{'CPU s':>9}{'FP32/it':>9}{'peak GB':>9}")
    with use_backend(backend):
        models = {recipe or "FP32": sam_parts(build(options.model, recipe), options.boxes) for recipe in recipes}
        measured = {
            part: in_turn({name: parts[part] for name, parts in models.items()}, options.repeats)
            for part in ("encoder", "decoder")
        }
        models.clear()
        for part, times in measured.items():
            for name, recipe in zip(times, recipes, strict=True):
                memory = peak(options.model, recipe, part, options.boxes)
                t, ratio = times[name], times["FP32"].least / times[name].least
                print(f"{part:10}{name:>12}{t.least:9.3f}{t.median:10.3f}{min(t.cpu):9.3f}{ratio:9.2f}{memory:9.2f}")


if __name__ == "__main__":
    run_tool(main)
