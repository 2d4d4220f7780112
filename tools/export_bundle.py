# SPDX-License-Identifier: Apache-2.0
"""Write a quantized SAM or SAM 2 as a bundle of ONNX graphs that runtimes execute on integers, and measure it: masks
beside PyTorch's, time beside the same model in floating point in the same runtime, on one thread, in turn."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from ahcq_plugin import load_quantized
from ahcq_plugin.export import export_onnx
from ahcq_plugin.export.onnx_bundle import note_parity, read_bundle
from ahcq_plugin.export.onnx_runtimes import RUNTIMES
from ahcq_plugin.export.onnx_sam2_parts import is_sam2
from ahcq_plugin.ptq import AuditError, audit
from ahcq_plugin.ptq.prepare import recipe_in
from ahcq_plugin.studies import onnx_parity, onnx_video_parity
from ahcq_plugin.support.arguments import at_least_one, writable_folder
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.rebuild import built_as, rebuild, rebuild_from_state
from ahcq_plugin.zoo.sam import box_forward
from ahcq_plugin.zoo.segment import prepare_frames
from ahcq_plugin.zoo.track import clip_forward


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth or quantized.safetensors")
    parser.add_argument("-o", "--out", type=writable_folder, required=True, help="folder of the bundle")
    parser.add_argument("--style", choices=("exact", "deploy"), default="deploy")
    parser.add_argument("--int4", action="store_true", help="weights of at most 4 bits as INT4, opset 21")
    parser.add_argument("--images", type=at_least_one, default=8, help="to compare masks on; of a SAM 2 clips")
    parser.add_argument("--coco", type=Path, help="COCO folder with instances.json and images/; default: generated")
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=RUNTIMES[:1], help="none: no measurement")
    parser.add_argument("--runs", type=at_least_one, default=7, help="timed pairs of runs")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    model = load_quantized(args.checkpoint)
    export_onnx(model, args.out, style=args.style, int4=args.int4)
    built = built_as(model)  # times do not depend on the weights
    floating = rebuild(built) if built else rebuild_from_state(model.state_dict())
    if is_sam2(model):
        study, measure, forward = onnx_video_parity, onnx_video_parity.measure_videos, clip_forward
        items: Any = onnx_video_parity.generated_clips(args.images, 7, model.image_size)
        first = {"frames": prepare_frames(items[0][0], model.image_size), "masks": torch.from_numpy(items[0][1])}
    else:
        study, measure, forward = onnx_parity, onnx_parity.measure, box_forward
        found = coco_items(args.coco) if args.coco else scene_items(2 * args.images, seed=7)
        items = [make_batch(model, i.image, i.boxes[:4]) for i in itertools.islice(found, args.images)]
        first = items[0]
    if not (outcome := audit(model, first, forward, recipe_in(model))).passed:
        raise AuditError(outcome)
    rows = measure(model, floating, args.out, items, args.runtimes, args.runs)
    note_parity(args.out, [row.to_dict() for row in rows])
    for file, size in read_bundle(args.out)["bytes"].items():
        print(f"{file}: {size / 1e6:.2f} MB")
    print("", study.TITLES, *(line for row in rows for line in row.lines()), sep="\n")
    if rows:
        print(f"\n{rows[0].masks} masks; load {max(r.load for r in rows):.1f}")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run_tool(main)
