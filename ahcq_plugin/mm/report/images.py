# SPDX-License-Identifier: Apache-2.0
"""Pictures of the report's sample images: boxes and outlines, masks over the image, differences of masks."""

from __future__ import annotations

import cv2
import numpy as np

#: Sample images are not shown wider than this, in pixels.
MAX_WIDTH = 480
#: Colours of the objects of an image, hex RGB, distinct for the colour-blind (of Okabe and Ito, and of Tol).
OBJECT_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#332288", "#882255", "#b0b0b0")
#: Difference of masks, by kind of pixel.
DIFFERENCE = {
    "none": "#f2f2f2",
    "both": "#9c9c9c",
    "only FP": "#0072b2",
    "only quantized": "#d55e00",
    "mixed": "#000000",
}


def rgb(colour: str) -> tuple[int, int, int]:
    """0..255 from ``#rrggbb``."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def object_colour(index: int) -> str:
    """Hex colour of an image's ``index``-th object."""
    return OBJECT_COLOURS[index % len(OBJECT_COLOURS)]


def difference_image(floating: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): where the masks of each object agree, and where only one model has them.

    Args:
        floating, quantized: bool (N, H, W), compared object by object. A pixel is ``mixed`` when one object lost it and
            another gained it.
    """
    lost = (floating & ~quantized).any(0)
    gained = (quantized & ~floating).any(0)
    image = np.empty((*lost.shape, 3), np.uint8)
    image[:] = rgb(DIFFERENCE["none"])
    image[(floating & quantized).any(0)] = rgb(DIFFERENCE["both"])
    image[lost] = rgb(DIFFERENCE["only FP"])
    image[gained] = rgb(DIFFERENCE["only quantized"])
    image[lost & gained] = rgb(DIFFERENCE["mixed"])
    return image


def shrink(image: np.ndarray) -> np.ndarray:
    """The image at most :data:`MAX_WIDTH` pixels wide, averaged; (H, W) or (H, W, 3) uint8."""
    height, width = image.shape[:2]
    if width <= MAX_WIDTH:
        return image
    size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def shrink_mask(mask: np.ndarray) -> np.ndarray:
    """bool (H, W) at the size of ``shrink``: where most of a pixel is covered."""
    return shrink(mask.astype(np.uint8) * 255) > 127


def draw_truth(image: np.ndarray, boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Image with the boxes and the outlines of the ground truth, one colour an object.

    Args:
        image: uint8 (H, W, 3) RGB.
        boxes: float (N, 4) xyxy in its pixels.
        truth: bool (N, H, W).
    """
    canvas = np.ascontiguousarray(shrink(image)).copy()
    factor = np.array([canvas.shape[1] / image.shape[1], canvas.shape[0] / image.shape[0]] * 2)
    for index, (box, mask) in enumerate(zip(boxes, truth, strict=True)):
        colour = rgb(object_colour(index))
        x0, y0, x1, y1 = np.round(box * factor).astype(int).tolist()
        small = shrink_mask(mask)
        _outline(canvas, small, (0, 0, 0), 4)
        _outline(canvas, small, colour, 2)
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, 2)
    return canvas


def draw_masks(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Faded grey image under the masks, bool (N, H, W), one colour an object."""
    grey = cv2.cvtColor(np.ascontiguousarray(shrink(image)), cv2.COLOR_RGB2GRAY)
    canvas = np.repeat((grey[..., None] * 0.6 + 80).astype(np.uint8), 3, axis=2)
    shrunk = [shrink_mask(mask) for mask in masks]
    for index, mask in enumerate(shrunk):
        colour = np.array(rgb(object_colour(index)))
        canvas[mask] = (canvas[mask] * 0.4 + colour * 0.6).astype(np.uint8)
    for index, mask in enumerate(shrunk):
        _outline(canvas, mask, rgb(object_colour(index)), 1)
    return canvas


def encode_png(image: np.ndarray) -> bytes:
    """PNG of uint8 (H, W, 3) RGB."""
    return _encode(image, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 9])


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG of uint8 (H, W, 3) RGB: a PNG of a photo takes eight times the room."""
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85])


def _encode(image: np.ndarray, kind: str, options: list[int]) -> bytes:
    done, content = cv2.imencode(kind, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise RuntimeError(f"OpenCV cannot encode an image of shape {image.shape} as {kind}")
    return content.tobytes()


def _outline(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], thickness: int) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, colour, thickness, cv2.LINE_AA)
