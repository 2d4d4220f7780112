# SPDX-License-Identifier: Apache-2.0
"""One image under several models: boxes, the masks of the floating-point SAM, those of each quantized checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM
from ahcq_plugin.mm.data.images import read_rgb
from ahcq_plugin.mm.report.images import draw_masks, draw_truth
from ahcq_plugin.ptq import read_checkpoint
from ahcq_plugin.support.files import replacing
from ahcq_plugin.zoo.coco import read_content
from ahcq_plugin.zoo.sam import build_sam, name_of_state

COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    """A picture and what stands under it.

    Args:
        iou: mean over the boxes of the overlap with the floating-point masks; None for the image and for these masks.
    """

    title: str
    image: np.ndarray
    iou: float | None = None


def read_boxes(annotations: str | Path, image: str | Path) -> Tensor:
    """True boxes (N, 4) xyxy of the image of that file name in a COCO annotation file, crowds left out.

    Raises:
        FileNotFoundError, ValueError: no such file, not COCO, or no box for the image.
    """
    content, name = read_content(annotations), Path(image).name
    ids = {row["id"] for row in content["images"] if Path(row["file_name"]).name == name}
    rows = [row for row in content["annotations"] if row["image_id"] in ids and not row.get("iscrowd")]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (row["bbox"] for row in rows)]
    if not boxes:
        raise ValueError(f"{annotations} has no box for an image {name}")
    return torch.tensor(boxes, dtype=torch.float32)


def _check_boxes(boxes: Tensor, size: tuple[int, int]) -> None:
    """ValueError for a box without area, or with none of it in an image of ``size`` (height, width)."""
    corner = torch.tensor([size[1], size[0]])
    for box in boxes:
        low, high = box[:2].clamp(min=0), torch.minimum(box[2:], corner)
        if not (box.isfinite().all() and (high > low).all()):
            raise ValueError(
                f"the box {', '.join(f'{number:g}' for number in box.tolist())} has no area in an image of {size[1]} x "
                f"{size[0]} pixels: give x0,y0,x1,y1 with x0 < x1, y0 < y1"
            )


def compare(
    image_path: str | Path,
    boxes: Tensor,
    checkpoints: Sequence[str | Path],
    sam_checkpoint: str | Path | None = None,
    device: str = "cpu",
) -> list[Panel]:
    """The image with its boxes, then the masks of the floating-point model and of every checkpoint.

    Args:
        boxes: (N, 4) xyxy in pixels of the image.
        checkpoints: ``quantized.pth`` of runs, all of one of the named SAMs.
        sam_checkpoint: floating-point weights; default: where configs look for those of that SAM.

    Raises:
        FileNotFoundError, ValueError: a file is absent or not what it should be; checkpoints of different SAMs.
    """
    image = read_rgb(image_path) if Path(image_path).is_file() else None
    if image is None:
        raise FileNotFoundError(f"no image {image_path}")
    _check_boxes(boxes, image.shape[:2])
    quantized = [read_checkpoint(path) for path in checkpoints]
    names = {name_of_state(checkpoint.state) for checkpoint in quantized}
    if len(names) != 1:
        raise ValueError(f"give checkpoints of one SAM, got {', '.join(sorted(names)) or 'none'}")
    (name,) = names

    def masks_of(sam) -> np.ndarray:
        model = BoxPromptedSAM(sam.to(device)).eval()
        return model.segment(image, boxes)[0].cpu().numpy()

    floating = masks_of(build_sam(name, sam_checkpoint))
    nothing = np.zeros((len(boxes), *image.shape[:2]), dtype=bool)
    panels = [Panel("image", draw_truth(image, boxes.numpy(), nothing)), Panel("FP", draw_masks(image, floating))]
    for checkpoint in quantized:
        masks, recipe = masks_of(checkpoint.load_into(build_sam(name, False))), checkpoint.recipe
        iou = float(mask_iou(floating, masks).mean())
        panels.append(Panel(f"{recipe.name} W{recipe.w_bits}A{recipe.a_bits}", draw_masks(image, masks), iou))
    return panels


def draw(panels: Sequence[Panel], path: str | Path) -> None:
    """The panels side by side, at most :data:`COLUMNS` in a row, as one PNG written atomically."""
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    height, width = panels[0].image.shape[:2]
    figure = Figure(figsize=(3 * columns, rows * (3 * height / width + 0.4)), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, panel in zip(figure.axes, panels, strict=False):
        axes.imshow(panel.image)
        iou = "" if panel.iou is None else f"\nIoU to FP {panel.iou:.3f}"
        axes.set_title(panel.title + iou, fontsize=9, y=-0.02, va="top")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
