# SPDX-License-Identifier: Apache-2.0
"""Mean IoU with ground-truth boxes, beside answers that need no image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.zoo.items import Item
from ahcq_plugin.zoo.predict import predict_masks

#: Upper bounds of COCO's size classes, square pixels.
SMALL, MEDIUM = 32**2, 96**2
SIZES = ("all", "small", "medium", "large")


def filled_box(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels (H, W) bool whose centre lies in the box xyxy."""
    x, y = np.arange(shape[1]) + 0.5, np.arange(shape[0])[:, None] + 0.5
    return (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])


def filled_ellipse(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels (H, W) bool whose centre lies in the ellipse inscribed in the box xyxy."""
    x, y = np.arange(shape[1]) + 0.5, np.arange(shape[0])[:, None] + 0.5
    half = np.maximum((box[2:] - box[:2]) / 2, 0.5)
    middle = (box[:2] + box[2:]) / 2
    return ((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 <= 1


class BlankEncoder(nn.Module):
    """Stands for an image encoder that always sees a blank (mid-grey, zero after normalisation) image."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.img_size = encoder.img_size
        parameter = next(encoder.parameters())
        with torch.no_grad():
            blank = encoder(torch.zeros(1, 3, self.img_size, self.img_size, device=parameter.device))
        self.register_buffer("embedding", blank)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.embedding.expand(len(image), -1, -1, -1)


def blind(sam: Sam) -> Sam:
    """A copy that sees a blank image whatever it is shown."""
    copied = copy.deepcopy(sam)
    copied.image_encoder = BlankEncoder(copied.image_encoder)
    return copied


def mean_iou_by_size(
    items: Iterable[Item], answers: dict[str, Callable[[Item], Iterable[np.ndarray]]]
) -> dict[str, dict[str, float]]:
    """Mean IoU of each kind of answer over all objects, and over those of each COCO size class.

    Args:
        answers: name -> function from an item to its masks, in the order of the boxes.
    Returns: name -> {"all", "small", "medium", "large": mean IoU, NaN without such objects}, and "objects" -> counts.
    """
    values: dict[str, list[float]] = {name: [] for name in answers}
    areas: list[float] = []
    for item in items:
        areas.extend(item.areas.tolist())
        for name, answer in answers.items():
            values[name] += [mask_iou(a, b) for a, b in zip(answer(item), item.masks, strict=True)]
    area = np.array(areas)
    members = {
        "all": area >= 0,
        "small": area < SMALL,
        "medium": (area >= SMALL) & (area < MEDIUM),
        "large": area >= MEDIUM,
    }
    table = {
        name: {
            size: float(np.mean(np.array(v)[members[size]])) if members[size].any() else float("nan") for size in SIZES
        }
        for name, v in values.items()
    }
    return {**table, "objects": {size: int(members[size].sum()) for size in SIZES}}


def model_answer(sam: Sam) -> Callable[[Item], np.ndarray]:
    """The masks ``sam`` gives for the boxes of an item."""
    return lambda item: predict_masks(sam, item.image, item.boxes)[0]


def compare(sam: Sam, items: Iterable[Item]) -> dict[str, dict[str, float]]:
    """:func:`mean_iou_by_size` of the model, the model on a blank image, the filled box and the inscribed ellipse."""
    return mean_iou_by_size(
        items,
        {
            "model": model_answer(sam),
            "blank image": model_answer(blind(sam)),
            "filled box": lambda item: [filled_box(b, item.image.shape[:2]) for b in item.boxes],
            "ellipse": lambda item: [filled_ellipse(b, item.image.shape[:2]) for b in item.boxes],
        },
    )
