# SPDX-License-Identifier: Apache-2.0
"""Write a quantized SAM as a bundle of ONNX graphs that runtimes execute on integers, and measure it: masks beside
PyTorch's, time beside the same SAM in floating point in the same runtime, on one thread, in turn."""

import argparse
import itertools
from pathlib import Path

import torch

from ahcq_plugin import load_quantized
from ahcq_plugin.export import export_onnx
from ahcq_plugin.export.onnx_bundle import note_parity, read_bundle
from ahcq_plugin.export.onnx_runtimes import RUNTIMES
from ahcq_plugin.ptq import AuditError, audit
from ahcq_plugin.ptq.prepare import recipe_in
from ahcq_plugin.studies.onnx_parity import measure
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.rebuild import rebuild_from_state
from ahcq_plugin.zoo.sam import box_forward


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth or quantized.safetensors")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--style", choices=("exact", "deploy"), default="deploy")
    parser.add_argument("--int4", action="store_true", help="weights of at most 4 bits as INT4, opset 21")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--coco", type=Path, help="COCO folder with instances.json and images/; default: scenes")
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=RUNTIMES[:1], help="none: no measurement")
    parser.add_argument("--runs", type=int, default=7, help="timed pairs of runs")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    model = load_quantized(args.checkpoint)
    export_onnx(model, args.out, style=args.style, int4=args.int4)
    floating = rebuild_from_state(model.state_dict())  # times do not depend on the weights
    items = coco_items(args.coco) if args.coco else scene_items(2 * args.images, seed=7)
    batches = [make_batch(model, i.image, i.boxes[:4]) for i in itertools.islice(items, args.images)]
    if not (outcome := audit(model, batches[0], box_forward, recipe_in(model))).passed:
        raise AuditError(outcome)
    rows = measure(model, floating, args.out, batches, args.runtimes, args.runs)
    note_parity(args.out, [row.to_dict() for row in rows])
    for file, size in read_bundle(args.out)["bytes"].items():
        print(f"{file}: {size / 1e6:.2f} MB")
    print(
        "\n| runtime | IoU to PyTorch (least) | encoder ms, least / median | FP32 | ratio | decoder ms | FP32 | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        times = [f"{least:.1f} / {half:.1f}" for least, half in (r.encoder, r.encoder_fp, r.decoder, r.decoder_fp)]
        encoder = f"{times[0]} | {times[1]} | {r.encoder_ratio:.2f}"
        decoder = f"{times[2]} | {times[3]} | {r.decoder_ratio:.2f}"
        print(f"| {r.runtime} | {r.iou:.3f} ({r.least_iou:.3f}) | {encoder} | {decoder} |")
    if rows:
        print(f"\n{rows[0].masks} masks; decoder: {rows[0].boxes} boxes; load {max(r.load for r in rows):.1f}")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run_tool(main)
