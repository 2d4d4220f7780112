# SPDX-License-Identifier: Apache-2.0
"""Convert a YOLOX ONNX file (batch norm folded) to a checkpoint for mmdet's config of the same size."""

import argparse
import sys
import warnings

with warnings.catch_warnings(record=True):  # torch shows one whatever the filters when mmengine imports its optimizers
    from ahcq_plugin.mm.detectors.convert_yolox import NANO_CONFIG, convert_yolox


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", help="for example yolox_nano.onnx")
    parser.add_argument("out", help="for example checkpoints/yolox_nano.pth")
    parser.add_argument(
        "--config", default=NANO_CONFIG, help="mmdet's config, below its configs (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        count = convert_yolox(args.onnx, args.out, args.config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {count} convolutions from {args.onnx}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
