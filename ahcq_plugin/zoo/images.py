# SPDX-License-Identifier: Apache-2.0
"""Image files: decoded as everything here sees them, or only looked at."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

T = TypeVar("T")


def decode_image(content: bytes, path: str | Path) -> np.ndarray:
    """The bytes of an image file as (H, W, 3) uint8 RGB, rotated by its EXIF flag; ``path`` is for the message.

    Raises: ValueError: not an image, or one of so many pixels (179 million) that Pillow takes it for an attack.
    """
    _check_pixels(content, path)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    except cv2.error:  # a header of more pixels than it takes
        image = None
    if image is None:
        raise ValueError(f"{path} is not a readable image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _check_pixels(content: bytes, path: str | Path) -> None:
    """A header of few bytes can ask for gigabytes. What else is wrong with a file, its decoder says."""
    try:
        with Image.open(io.BytesIO(content)):
            pass
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error
    except Exception:  # noqa: BLE001 - anything, see ``with_pillow``
        return


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, which is not decoded; its EXIF flag is not obeyed.

    Raises: ValueError: not an image.
    """
    return with_pillow(path, lambda image: (image.height, image.width))


def with_pillow(path: str | Path, read: Callable[[Image.Image], T]) -> T:
    """What ``read`` returns of an image file that Pillow has opened.

    Raises: ValueError: not an image: Pillow's readers raise anything for damaged files.
    """
    try:
        with Image.open(path) as image:
            return read(image)
    except UnidentifiedImageError as error:
        raise UnknownFormatError(f"{path} is not a readable image ({error})") from error
    except Exception as error:
        raise ValueError(f"{path} is not a readable image ({error or type(error).__name__})") from error


class UnknownFormatError(ValueError):
    """A file in none of Pillow's formats."""


def check_header(path: str | Path, size: tuple[int, int]) -> None:
    """A quick look at an image file, which is not decoded.

    Args:
        size: (height, width) that its annotation says, after the EXIF flag is obeyed.

    Raises: ValueError: not an image, or of another size.
    """
    try:
        found = with_pillow(path, lambda image: image.size if _is_turned(image) else image.size[::-1])
    except UnknownFormatError:
        found = decode_image(Path(path).read_bytes(), path).shape[:2]  # of a format that only OpenCV knows
    if tuple(found) != size:
        raise ValueError(f"{path} has {tuple(found)} pixels (H, W), its annotation says {size}")


def _is_turned(image: Image.Image) -> bool:
    """Whether its EXIF flag swaps height and width; damaged EXIF data say nothing, as to OpenCV."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - anything, see ``with_pillow``
        return False
    return isinstance(orientation, int) and 5 <= orientation <= 8
