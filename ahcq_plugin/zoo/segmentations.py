# SPDX-License-Identifier: Apache-2.0
"""Segmentations of COCO annotations, looked at before pycocotools: its C code trusts what it is given, and crashes or
runs for hours on garbage."""

from __future__ import annotations

import math
from typing import Any

#: How far polygons may reach outside of the image, in widths and heights of it; rounding leaves them a little outside.
MARGIN = 1


def problem_of(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with polygons or run lengths for an image of ``size`` (height, width), in words; None: nothing."""
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "it is neither polygons nor run lengths (size, counts)"
    if list(segmentation["size"] if isinstance(segmentation["size"], (list, tuple)) else ()) != list(size):
        return f"its run lengths are for size {segmentation['size']!r}, the image has {list(size)} (height, width)"
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _decompressed(counts)
        if counts is None:
            return "its compressed run lengths are garbage"
    if not isinstance(counts, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts
    ):
        return "its run lengths are not all whole numbers from 0 on"
    if sum(counts) != size[0] * size[1]:
        return f"its run lengths add up to {sum(counts)}, the image has {size[0] * size[1]} pixels"
    return None


def _of_polygons(polygons: list, size: tuple[int, int]) -> str | None:
    if not polygons:
        return "it has no polygon"
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon is a list of at least three x, y"
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in polygon):
            return "a polygon holds what is no finite number"
        for limit, along in ((size[1], polygon[::2]), (size[0], polygon[1::2])):
            if min(along) < -MARGIN * limit or max(along) > (1 + MARGIN) * limit:
                return (
                    f"a polygon reaches far out of the image, from {min(along):g} to {max(along):g} of {limit} pixels"
                )
    return None


def _decompressed(text: str | bytes) -> list[int] | None:
    """Run lengths of COCO's compressed form: base 32, lowest digits first, from the third on as differences to the one
    before the last; None: the text is no such thing."""
    counts: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else text.encode("utf-8"):
        digit = code - 48
        if not 0 <= digit < 64 or shift > 30:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts if not shift else None
