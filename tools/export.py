# SPDX-License-Identifier: Apache-2.0
"""Write the layer spec of a quantized SAM, for the golden model and for hardware; with --onnx its ONNX graphs too."""

import argparse
from pathlib import Path

from ahcq_plugin import load_quantized
from ahcq_plugin.export import export_onnx, export_spec
from ahcq_plugin.support.arguments import writable_folder
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.sam import build_sam

ROW = "{:<50} {:<34} {:<7} {:<8} {:>5} {:>5} {:>5} {:>5} {:>8}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="quantized.pth of tools/ptq.py or of quantize()")
    parser.add_argument("-o", "--out", type=writable_folder, required=True, help="folder of the spec")
    parser.add_argument("--sam", help="sam_tiny, vit_b, vit_l or vit_h; default: as the checkpoint's shapes say")
    parser.add_argument("--onnx", action="store_true", help="also image_encoder.onnx, mask_decoder.onnx, bundle.json")
    parser.add_argument(
        "--style", choices=("exact", "deploy"), help="of the ONNX graphs (docs/export.md); default: exact"
    )
    parser.add_argument("--int4", action="store_true", help="style deploy: weights of at most 4 bits as INT4, opset 21")
    args = parser.parse_args()
    if not args.onnx and (args.style or args.int4):
        parser.error("--style and --int4 are of the ONNX graphs: give --onnx too")
    if args.int4 and args.style != "deploy":
        parser.error("--int4 is of --style deploy")
    args.style = args.style or "exact"
    return args


def main() -> int:
    args = parse_args()
    model = load_quantized(args.checkpoint, (lambda _: build_sam(args.sam, checkpoint=False)) if args.sam else None)
    spec = export_spec(model, args.out)
    if args.onnx:
        export_onnx(model, args.out, style=args.style, int4=args.int4)
    print(ROW.format("unit", "matmul", "kind", "left", "batch", "m", "k", "n", "acc bits"))
    for unit, m in spec.matmuls():
        shape = m.batch, m.m, m.k, m.n, m.accumulator_bits
        print(ROW.format(unit.name, m.layer or m.name, m.kind, m.left.family, *shape))
    for line in spec.left_out:
        print(f"not exported: {line}")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run_tool(main)
