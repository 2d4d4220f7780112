#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ways to run a SAM side by side: PyTorch, onnxruntime, OpenVINO, their INT8, and what this package makes of it.

    python tools/bench_inference.py --models sam_tiny vit_b sam2.1_t --write

Files are made once and kept in --work, and so are rows until they are measured again with as many threads; each way
runs in a process of its own, in turn with FP32 PyTorch. --write puts
tables and chart into docs/inference.md and docs/inference.png, of the models that were measured in one folder.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ahcq_plugin.studies.inference.artefacts import Subject, make
from ahcq_plugin.studies.inference.bench import measure
from ahcq_plugin.studies.inference.page import keep_row, read_rows, write_page
from ahcq_plugin.studies.inference.variants import VARIANTS
from ahcq_plugin.support.arguments import at_least_one, box_count, thread_count, writable_folder
from ahcq_plugin.support.tool import run_tool

ROOT = Path(__file__).resolve().parents[1]
#: Random weights where the package has none that know boxes; pairs of calls: fewer where one takes long.
SUBJECTS = {
    "sam_tiny": Subject("sam_tiny", True),
    "vit_b": Subject("vit_b", False, 2),
    "sam2.1_t": Subject("sam2.1_t", False, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--variants", nargs="+", choices=[v.name for v in VARIANTS], help="default: all")
    parser.add_argument("--boxes", nargs="+", type=box_count, default=[1, 16, 64], help="of the decoder")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="pairs of calls")
    parser.add_argument("--threads", type=thread_count, default=1)
    parser.add_argument("--images", type=at_least_one, default=32, help="scenes whose masks are compared")
    parser.add_argument("--work", type=writable_folder, default=Path("work_dirs/bench_inference"))
    parser.add_argument("--write", action="store_true", help="docs/inference.md from all results in --work")
    args = parser.parse_args()
    for name in args.models:
        subject, folder = SUBJECTS[name], args.work / name
        print(f"{name}: making what is missing in {folder}", flush=True)
        ways = [v for v in VARIANTS if not args.variants or v.name in args.variants]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # its memory goes with it
            alone.submit(make, subject, folder, [v.files for v in ways]).result()
        for row in measure(subject, folder, ways, args.boxes, args.repeats, args.threads, args.images):
            print(
                f"{name} {row.runtime} {row.computes}: {row.error or [round(p.ratio, 2) for p in row.parts]}",
                flush=True,
            )
            keep_row(row, args.threads, folder / "rows.json")
    found = read_rows(args.work)
    if args.write:
        write_page(found, ROOT / "docs" / "inference.md")
    return 0


if __name__ == "__main__":
    run_tool(main)
