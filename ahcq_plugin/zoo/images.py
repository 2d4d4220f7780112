# SPDX-License-Identifier: Apache-2.0
"""Image files: decoded as everything here sees them, or only looked at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError


def decode_image(content: bytes, path: str | Path) -> np.ndarray:
    """The bytes of an image file as (H, W, 3) uint8 RGB, rotated by its EXIF flag; ``path`` is for the message.

    Raises: ValueError: not an image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    except cv2.error:  # a header of more pixels than it takes
        image = None
    if image is None:
        raise ValueError(f"{path} is not a readable image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, which is not decoded; its EXIF flag is not obeyed.

    Raises: ValueError: not an image.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error


def check_header(path: str | Path, size: tuple[int, int]) -> None:
    """A quick look at an image file, which is not decoded.

    Args:
        size: (height, width) that its annotation says, after the EXIF flag is obeyed.

    Raises: ValueError: not an image, or of another size.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            found = image.size if turned else image.size[::-1]
    except UnidentifiedImageError:
        found = decode_image(Path(path).read_bytes(), path).shape[:2]  # of a format that only OpenCV knows
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error
    if tuple(found) != size:
        raise ValueError(f"{path} has {tuple(found)} pixels (H, W), its annotation says {size}")
