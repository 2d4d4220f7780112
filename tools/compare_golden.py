# SPDX-License-Identifier: Apache-2.0
"""The integer golden model of a quantized SAM beside PyTorch: a table by matmul, by chained unit, and the masks."""

import argparse
import itertools
from pathlib import Path

import numpy as np

from ahcq_plugin import load_quantized
from ahcq_plugin.export import OnnxSam, export_onnx, load_spec
from ahcq_plugin.export.compare import check_of_model, compare
from ahcq_plugin.studies.golden_masks import golden_runs, mask_rows, softmax_total
from ahcq_plugin.support.arguments import at_least_one
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward

BOXES = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth")
    parser.add_argument("spec", type=Path, help="folder that tools/export.py wrote for it")
    parser.add_argument("--images", type=at_least_one, default=8)
    parser.add_argument("--coco", type=Path, help="COCO folder with instances.json and images/; default: scenes")
    parser.add_argument("--onnx", action="store_true", help="compare the ONNX graphs in that folder too")
    parser.add_argument("--masks", action="store_true", help="masks only, not matmul by matmul")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = load_quantized(args.checkpoint)
    spec = load_spec(args.spec)
    check_of_model(model, spec)
    items = coco_items(args.coco) if args.coco else scene_items(2 * args.images, seed=7)
    items = list(itertools.islice(items, args.images))
    if not args.masks:
        batches = [make_batch(model, item.image, item.boxes[:BOXES]) for item in items]
        print_matmuls(*compare(model, spec, batches, box_forward))
    softmaxes = []
    runs = golden_runs(model, spec, softmaxes)
    if args.onnx:
        export_onnx(model, args.spec)
        runs["ONNX in onnxruntime"] = OnnxSam(args.spec)
    print("| masks | IoU to PyTorch's | least | flipped pixels | IoU to golden model's | least | IoU to the truth |")
    print("|---|---|---|---|---|---|---|")
    for name, row in mask_rows(model, items, runs, BOXES).items():
        near, golden, true = np.mean(row.to_pytorch), np.mean(row.to_golden), np.mean(row.truth)
        figures = f"{near:.4f} | {min(row.to_pytorch):.4f} | {row.flipped} | {golden:.4f} | {min(row.to_golden):.4f}"
        print(f"| {name} | {figures} | {true:.4f} |")
    whole = softmax_total(softmaxes)
    print(
        f"\n{whole.differing} of {whole.codes} codes of softmax on tables differ from those of a float softmax of the"
    )
    print(f"same scores, {whole.further} by more than a level; left in floating point: {whole.reason or 'none'}")


def print_matmuls(rows, units) -> None:
    print("error of one output, in 2^-24 of the sum of the magnitudes of its terms, and its proven limit")
    print("| unit | matmul | kind | left | k | golden | limit | PyTorch | limit | codes that differ, chained |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        m, share = r.matmul, f"{r.differing} of {r.codes}"
        figures = f"{r.golden_error:.2f} | {r.golden_limit:.0f} | {r.torch_error:.2f} | {r.torch_limit:.0f}"
        print(f"| {r.unit} | {m.layer or m.name} | {m.kind} | {m.left.family} | {m.k} | {figures} | {share} |")
    print("\n| chained unit | codes that differ | relative difference of its output |\n|---|---|---|")
    for u in units:
        print(f"| {u.unit} | {u.share:.5%} | {u.error:.1e} |")
    print()


if __name__ == "__main__":
    run_tool(main)
