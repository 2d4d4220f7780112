# SPDX-License-Identifier: Apache-2.0
"""Original pixels of a data sample: SAM sees them, not what the detector's pipeline made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.fileio import get

from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.zoo.images import decode_image


@TRANSFORMS.register_module()
class KeepOriginalImage(BaseTransform):
    """Carry the image as loaded along as ``ori_img``: for images in memory, which cannot be read again from a path.

    Place it right after the loading transform and add ``'ori_img'`` to the ``meta_keys`` of ``PackDetInputs``.
    """

    def transform(self, results: dict) -> dict:
        """Copy ``results['img']``, (H, W, 3) BGR or (H, W) grey, to ``results['ori_img']``."""
        results["ori_img"] = results["img"].copy()
        return results


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) RGB from uint8 (H, W), (H, W, 1), BGR (H, W, 3) or BGRA (H, W, 4).

    Raises:
        DataError: another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(f"an image must be uint8 (H, W) or (H, W, 1 | 3 | 4), got {image.dtype} {image.shape}")
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image[..., 2::-1])


def read_rgb(path: str | Path) -> np.ndarray:
    """Image file as uint8 (H, W, 3) RGB, rotated by its EXIF flag as mmdet's loader does.

    Raises:
        FileNotFoundError, DataError: no such file; not an image.
    """
    content = get(str(path))
    try:
        return decode_image(content, path)
    except ValueError as error:
        raise DataError(str(error)) from error


def original_image(data_sample) -> np.ndarray:
    """RGB pixels before the pipeline: ``ori_img`` when the sample carries it, else ``img_path`` read again.

    Raises:
        DataError: neither is there, or the pixels do not have the sample's ``ori_shape``.
    """
    if "ori_img" in data_sample:
        image = as_rgb(data_sample.ori_img)
    elif data_sample.get("img_path") is not None:
        image = read_rgb(data_sample.img_path)
    else:
        raise DataError(
            "the data sample has neither `ori_img` nor `img_path`: put KeepOriginalImage after the loading transform "
            "and 'ori_img' into the meta_keys of PackDetInputs"
        )
    shape = data_sample.get("ori_shape")
    if shape is not None and tuple(shape[:2]) != image.shape[:2]:
        raise DataError(
            f"{data_sample.get('img_path')}: image of {image.shape[:2]}, data sample says {tuple(shape[:2])}"
        )
    return image
