# SPDX-License-Identifier: Apache-2.0
"""A COCO annotation file, checked row by row before anything is computed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ahcq_plugin.support.files import read_json
from ahcq_plugin.zoo.images import check_header
from ahcq_plugin.zoo.segmentations import problem_of

logger = logging.getLogger(__name__)

_PARTS = ("images", "annotations", "categories")


def check_coco(ann_file: str, folder: str, masks: bool) -> None:
    """Ids are known and different, sizes and boxes are numbers, images are there and, with ``masks``, all segmentations
    can be compared and all images have the headers of such.

    Args:
        folder: of the images.

    Raises:
        FileNotFoundError, ValueError: one line that names the first row at fault.
    """
    content = read_content(ann_file)
    sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
    for row in content["images"]:
        image = os.path.join(folder, row["file_name"])
        if not os.path.isfile(image):
            raise FileNotFoundError(f"{ann_file} lists {image}, which is not there")
        if not os.path.getsize(image):
            raise ValueError(f"{ann_file} lists {image}, which is empty")
        if masks:
            check_header(image, sizes[row["id"]])
    check_ids(ann_file, content)
    bare = [row["id"] for row in content["annotations"] if not row.get("segmentation") and not row.get("iscrowd")]
    if masks and bare:
        raise ValueError(
            f"{ann_file}: {len(bare)} annotations have no segmentation (first id {bare[0]}); masks are compared"
        )
    _tell_of_boxes(ann_file, content["annotations"], sizes)
    for row in content["annotations"]:
        problem = problem_of(row["segmentation"], sizes[row["image_id"]]) if masks and row.get("segmentation") else None
        if problem:
            raise ValueError(f"{ann_file}: the segmentation of annotation {row['id']} cannot be used: {problem}")


def _tell_of_boxes(ann_file: str, rows: Sequence[dict[str, Any]], sizes: dict[Any, tuple[int, int]]) -> None:
    """Boxes that are no prompts are left out by who reads the file, which nobody would notice."""
    flat, outside = [], []
    for row in rows:
        (x, y, width, height), size = row["bbox"], sizes[row["image_id"]]
        if width <= 0 or height <= 0:
            flat.append(row["id"])
        elif x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            outside.append(row["id"])
    for ids, what in ((flat, "have no area"), (outside, "lie outside of their image")):
        if ids:
            counted = f"{len(ids)} of {len(rows)} boxes {what} (first: annotation {ids[0]!r})"
            logger.warning("%s: %s; they are left out", ann_file, counted)


def read_content(ann_file: str | Path) -> dict[str, Any]:
    """The JSON of an annotation file: ids are different, sizes and boxes are numbers.

    Raises:
        FileNotFoundError, ValueError: no such file; one line that names the first row at fault.
    """
    if not Path(ann_file).is_file():
        raise FileNotFoundError(f"no annotation file {ann_file}")
    content = read_json(ann_file)
    if not isinstance(content, dict) or not set(_PARTS) <= content.keys():
        raise ValueError(f"{ann_file} is not in COCO format: expected an object with {', '.join(_PARTS)}")
    for part in _PARTS:
        if not isinstance(content[part], list):
            raise ValueError(f"{ann_file}: {part} must be a list, got {type(content[part]).__name__}")
        if part != "categories" and not content[part]:
            raise ValueError(f"{ann_file} has no {part}")
        for problem in _of_rows(part, content[part]):
            raise ValueError(f"{ann_file}: {problem}")
        if len({type(row["id"]) for row in content[part]}) > 1:  # they have no order
            raise ValueError(f"{ann_file}: {part} have ids that are numbers and ids that are texts; give one kind")
    return content


def check_ids(ann_file: str | Path, content: dict[str, Any]) -> None:
    """ValueError for an annotation of an image or a category that is not in the file."""
    ids = {part: {row["id"] for row in content[part]} for part in _PARTS}
    for row in content["annotations"]:
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if row[key] not in ids[part]:
                raise ValueError(f"{ann_file}: annotation {row['id']} has the unknown {key} {row[key]!r}")


def read_detections(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a detections file.

    Raises:
        FileNotFoundError, ValueError: no such file; not a JSON list with the four keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no detections file {path}: prompts must be 'detector', 'gt' or the path of a COCO results JSON"
        )
    rows = read_json(path)
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise ValueError(
            f"{path} is not in COCO results format: expected a list of objects with {', '.join(sorted(keys))}"
        )
    for index, row in enumerate(rows):
        box, score = row["bbox"], row["score"]
        numbers = [*box, score] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise ValueError(
                f"{path}: row {index} has the box {box!r:.60} and the score {score!r:.20}, not five numbers"
            )
        if not all(isinstance(row[key], (int, str)) for key in ("image_id", "category_id")):
            raise ValueError(f"{path}: row {index} has an id that is neither a whole number nor a text")
    return rows


def _of_rows(part: str, rows: Sequence[Any]) -> Iterator[str]:
    """What is wrong with the rows of a part, each by itself, in words."""
    seen = set()
    for index, row in enumerate(rows):
        where = f"{part}[{index}]"
        if not isinstance(row, dict):
            yield f"{where} must be an object, got {row!r:.60}"
        for key, (fits, expected) in _KEYS[part].items():
            if key not in row:
                yield f"{where} has no {key}"
            elif not fits(row[key]):
                yield f"{where} has {key} {row[key]!r:.60}, expected {expected}"
        if part == "annotations" and row.get("iscrowd") not in (None, 0, 1):
            yield f"{where} has iscrowd {row['iscrowd']!r:.60}, expected 0 or 1"
        if row["id"] in seen:
            yield f"{where} has the id {row['id']!r} of another row"
        seen.add(row["id"])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_ID = (lambda value: _is_whole(value) or isinstance(value, str)), "a whole number or a name"
_NAME = (lambda value: isinstance(value, str) and bool(value)), "a name"
_SIZE = (lambda value: _is_whole(value) and value >= 1), "a whole number of pixels from 1 on"
_NUMBER = _is_number, "a finite number"
_BOX = (
    (lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))),
    "x, y, width, height: four finite numbers",
)
#: Part -> key of its rows -> what fits, and that in words.
_KEYS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _ID, "file_name": _NAME, "height": _SIZE, "width": _SIZE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX, "area": _NUMBER},
    "categories": {"id": _ID, "name": _NAME},
}
