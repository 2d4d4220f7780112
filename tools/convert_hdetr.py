# SPDX-License-Identifier: Apache-2.0
"""Convert an official H-Deformable-DETR checkpoint (R50, Swin-T or Swin-L) to one for our config of that detector."""

import argparse

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    from ahcq_plugin.mm.detectors.convert_hdetr import convert_hdetr

from ahcq_plugin.support.arguments import check_apart, writable_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a file of the releases of HDETR/H-Deformable-DETR, dp0_mqs_lft")
    parser.add_argument("out", type=writable_file, help="for example checkpoints/hdetr_r50.pth")
    parser.add_argument(
        "--config", default="mm_configs/_base_/detectors/hdetr_r50.py", help="our config (default: %(default)s)"
    )
    args = parser.parse_args()
    check_apart(args.out, args.checkpoint, args.config)
    count = convert_hdetr(args.checkpoint, args.out, args.config)
    print(f"{args.out}: {count} tensors from {args.checkpoint}")
    return 0


if __name__ == "__main__":
    run_tool(main)
