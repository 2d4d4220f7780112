# SPDX-License-Identifier: Apache-2.0
"""One picture: an image under the floating-point SAM and under quantized checkpoints, with the overlap of masks."""

import argparse

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    import torch

    from ahcq_plugin.mm.report.compare import compare, draw, read_boxes

from ahcq_plugin.support.arguments import check_apart, usable_device, writable_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("checkpoints", nargs="+", help="quantized.pth of runs, all of one SAM")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--annotations", help="COCO file with true boxes of the image, found by its file name")
    given.add_argument("--box", action="append", metavar="X0,Y0,X1,Y1", help="in pixels of the image; repeat it")
    parser.add_argument("--sam-checkpoint", help="floating-point weights; default: where the configs look")
    parser.add_argument("--out", type=writable_file, default="compare.png", help="default: %(default)s")
    parser.add_argument("--device", type=usable_device, default="cpu")
    args = parser.parse_args()
    check_apart(args.out, args.image, *args.checkpoints, args.annotations, args.sam_checkpoint)
    boxes = read_boxes(args.annotations, args.image) if args.annotations else _parse(args.box)
    panels = compare(args.image, boxes, args.checkpoints, args.sam_checkpoint, args.device)
    draw(panels, args.out)
    for panel in panels[2:]:
        print(f"{panel.title}: IoU to FP {panel.iou:.4f} over {len(boxes)} boxes")
    print(f"written: {args.out}")
    return 0


def _parse(texts: list[str]) -> torch.Tensor:
    try:
        return torch.tensor([[float(number) for number in text.split(",")] for text in texts]).view(-1, 4)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--box must be four numbers x0,y0,x1,y1, got {' '.join(texts)}") from error


if __name__ == "__main__":
    run_tool(main)
