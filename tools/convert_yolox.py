# SPDX-License-Identifier: Apache-2.0
"""Convert a YOLOX ONNX file (batch norm folded) to a checkpoint for mmdet's config of the same size."""

import argparse

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    from ahcq_plugin.mm.detectors.convert_yolox import NANO_CONFIG, convert_yolox

from ahcq_plugin.support.arguments import check_apart, writable_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", help="for example yolox_nano.onnx")
    parser.add_argument("out", type=writable_file, help="for example checkpoints/yolox_nano.pth")
    parser.add_argument(
        "--config", default=NANO_CONFIG, help="mmdet's config, below its configs (default: %(default)s)"
    )
    args = parser.parse_args()
    check_apart(args.out, args.onnx, args.config)
    count = convert_yolox(args.onnx, args.out, args.config)
    print(f"{args.out}: {count} convolutions from {args.onnx}")
    return 0


if __name__ == "__main__":
    run_tool(main)
