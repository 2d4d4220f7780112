# SPDX-License-Identifier: Apache-2.0
"""Time of ACNR with one SVD and one Gram matrix, the Gram matrix included, against its definition step by step.

The definition (two SVDs and all error rows a step) runs for a few steps, in float32 and in float64, and is
extrapolated (~). Ours sums float32 errors and does the rest in float64. Processor time of one thread; the error rows
are one chunk, used over and over.
    python tools/bench_acnr.py [--shapes 768x3072 3072x768] [--chunks 32] [--timed 4] [--json result.json]
"""

import argparse
import time

import torch

from ahcq_plugin.prequant.acnr import ErrorGram, condition_weight
from ahcq_plugin.studies.reference.acnr import reduce_step_by_step
from ahcq_plugin.support.arguments import at_least_one, matrix_shape, writable_file
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.tool import run_tool

STEPS, ROWS = 200, 4096


def timed(function, *args, **kwargs):
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


def weight_and_errors(out: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weight of condition number 1e4 and a chunk of error rows, some channels much louder than others."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(out, inputs, generator=generator), full_matrices=False)
    weight = left * torch.logspace(0.5, -3.5, len(right)) @ right
    return weight, torch.randn(ROWS, inputs, generator=generator) * torch.logspace(-2, 1, inputs)


def measure(out: int, inputs: int, chunks: int, steps: int) -> dict:
    weight, errors = weight_and_errors(out, inputs)
    gram = ErrorGram(inputs)
    _, gram_s = timed(lambda: [gram.add(errors) for _ in range(chunks)])
    result, svd_s = timed(condition_weight, weight, gram.mean(), steps=STEPS)
    row = {"shape": f"{out}x{inputs}", "rows": ROWS * chunks, "gram_s": gram_s, "svd_and_steps_s": svd_s}
    row |= {"condition_before": result.condition_before, "condition_after": result.condition_after}
    for dtype in (torch.float32, torch.float64):
        rows = [errors.to(dtype)] * chunks
        expected, seconds = timed(reduce_step_by_step, weight.to(dtype), rows, steps=steps)
        seconds *= STEPS / steps
        row |= {f"definition_{dtype}_s": seconds, f"ratio_{dtype}": seconds / (gram_s + svd_s)}
    ours = condition_weight(weight.double(), gram.mean(), steps=steps).weight
    return row | {"difference": float((ours - expected).norm() / expected.norm())}  # float64, after the timed steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=matrix_shape, default=[(768, 3072), (3072, 768)], help="out x in")
    parser.add_argument("--chunks", type=at_least_one, default=32, help=f"chunks of {ROWS} error rows")
    parser.add_argument("--timed", type=at_least_one, default=4, help=f"steps of the definition, of {STEPS}")
    parser.add_argument("--json", type=writable_file, help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {args.chunks * ROWS} error rows, {STEPS} steps")
    print("out x in    Gram s  SVD+steps s  definition f32 s  ratio  definition f64 s  ratio  condition     difference")
    rows = []
    for shape in args.shapes:
        rows.append(row := measure(*shape, args.chunks, args.timed))
        print(f"{'x'.join(map(str, shape)):10} {row['gram_s']:7.1f} {row['svd_and_steps_s']:12.1f}", end="")
        for dtype in (torch.float32, torch.float64):
            print(f" {'~':>8}{row[f'definition_{dtype}_s']:8.0f} {row[f'ratio_{dtype}']:6.0f}x", end="")
        print(f"  {row['condition_before']:.0f} -> {row['condition_after']:.0f} {row['difference']:10.0e}", flush=True)
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    run_tool(main)
