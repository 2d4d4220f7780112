# SPDX-License-Identifier: Apache-2.0
"""The integer golden model of a quantized SAM beside PyTorch: a table by matmul, by chained unit, and the masks."""

import argparse
import itertools
from pathlib import Path

import torch

from ahcq_plugin import load_quantized
from ahcq_plugin.export import OnnxSam, export_onnx, load_spec
from ahcq_plugin.export.compare import check_of_model, compare, golden_forward, mask_overlap
from ahcq_plugin.support.arguments import at_least_one
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward

NUDGE = 1 + 2**-22  # changes the last bit of the image


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth")
    parser.add_argument("spec", type=Path, help="folder that tools/export.py wrote for it")
    parser.add_argument("--images", type=at_least_one, default=8)
    parser.add_argument("--coco", type=Path, help="COCO folder with instances.json and images/; default: scenes")
    parser.add_argument("--onnx", action="store_true", help="compare the ONNX graphs in that folder too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = load_quantized(args.checkpoint)
    spec = load_spec(args.spec)
    check_of_model(model, spec)
    items = coco_items(args.coco) if args.coco else scene_items(2 * args.images, seed=7)
    batches = [make_batch(model, i.image, i.boxes[:4]) for i in itertools.islice(items, args.images)]
    rows, units = compare(model, spec, batches, box_forward)
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
    runs = {"golden model, all units chained": lambda batch: golden_forward(model, spec, batch, box_forward)}
    runs["PyTorch, last bit of the image changed"] = lambda batch: box_forward(
        model, {**batch, "image": batch["image"] * NUDGE}
    )
    if args.onnx:
        export_onnx(model, args.spec)
        runs["ONNX in onnxruntime"] = OnnxSam(args.spec)
    print("\n| masks against PyTorch | mean IoU | least IoU | flipped pixels |\n|---|---|---|---|")
    for name, run in runs.items():
        with torch.no_grad():
            pairs = [mask_overlap(box_forward(model, batch)[0], run(batch)[0]) for batch in batches]
        overlaps = torch.cat([overlap for overlap, _ in pairs])
        flipped = sum(count for _, count in pairs)
        print(f"| {name} | {overlaps.mean():.4f} | {overlaps.min():.4f} | {flipped} |")


if __name__ == "__main__":
    run_tool(main)
