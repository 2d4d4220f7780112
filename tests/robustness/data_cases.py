# SPDX-License-Identifier: Apache-2.0
"""Further data: images of other formats and sizes, annotations and files of detections that lie, clips."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.robustness import kinds
from tests.robustness.case import Case
from tests.robustness.materials import Materials, config_text


def png_header(path: Path) -> None:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _linked(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def _array(shape: tuple[int, ...], kind: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.zeros(shape, np.uint8)).save(path, kind)


#: What is no image that a model can see.
IMAGES: dict[str, Callable[[Path], object]] = {
    "a header of 60,000 x 60,000": png_header,
    "900 million pixels of one bit": lambda path: Image.new("1", (30_000, 30_000)).save(path, "png"),
    "a link to /dev/zero": _linked("/dev/zero"),
    "a link to /dev/null": _linked("/dev/null"),
    "a link to a folder": _linked("/"),
    "an SVG": lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a PDF": lambda path: path.write_bytes(b"%PDF-1.4\n%%EOF\n"),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.zeros((4, 4, 3))),
    "JSON": lambda path: path.write_text("{}"),
    "a header of a JPEG": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0"),
    "a header of a PNG": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "a header of a GIF": lambda path: path.write_bytes(b"GIF89a"),
    "a header of a TIFF": lambda path: path.write_bytes(b"II*\0\x08\0\0\0"),
    "a header of a BMP": lambda path: path.write_bytes(b"BM"),
    "a header of a WebP": lambda path: path.write_bytes(b"RIFF\x10\0\0\0WEBPVP8 "),
}
#: Of another size than its annotation says, or one that vanishes when it is resized.
SIZES = {
    "1 x 20,000": _array((1, 20_000, 3), "png"),
    "20,000 x 1": _array((20_000, 1, 3), "png"),
    "1 x 1": _array((1, 1, 3), "png"),
}


def _of(part: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part][0].__setitem__(key, value)


def _all(part: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: [row.__setitem__(key, value) for row in content[part]]


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"{part}.{key} is {value!r}": _of(part, key, value)
        for part, keys in {
            "images": {
                "id": (None, 1.5, True, [1], math.nan),
                "height": (0, -1, 1.5, None, True, 10**9),
                "width": (0, -1, "64", math.inf),
                "file_name": (None, "", [], "a\0b", "../../../etc/passwd", "/etc/passwd", "x" * 300, "https://x/y.png"),
            },
            "annotations": {
                "id": (None, 1.5, {}),
                "image_id": (None, "1", 1.5, [1]),
                "category_id": (None, 1.5, [1]),
                "area": (None, "x", math.nan, math.inf, -5),
                "iscrowd": ("x", 5, None, [1]),
                "bbox": ([], {}, [1, 2, 3, "4"], [[1, 2, 3, 4]], [0, 0, 1e400, 1], [True, 0, 1, 1]),
            },
            "categories": {"id": (None, 1.5, [1]), "name": (None, "", 5, [1])},
        }.items()
        for key, values in keys.items()
        for value in values
    },
    **{
        f"segmentation is {value!r:.50}": _of("annotations", "segmentation", value)
        for value in (
            [[]],
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5]],
            [1, 2, 3, 4, 5, 6],
            [[[1, 2], [3, 4], [5, 6]]],
            [[1e30] * 6],
            [[math.inf] * 6],
            [[None] * 6],
            {},
            {"counts": [1]},
            {"size": [256], "counts": [1]},
            {"size": ["256", "256"], "counts": [65536]},
            {"size": [256, 256], "counts": 5},
            {"size": [256, 256], "counts": []},
            {"size": [256, 256], "counts": [1.5, 2]},
            {"size": [256, 256], "counts": ["a"]},
            {"size": [256, 256], "counts": [65535]},
            {"size": [256, 256], "counts": ""},
            {"size": [256, 256], "counts": "0"},
            {"size": [256, 256], "counts": "\u00e9\u4e2d"},
            {"size": [-1, 256], "counts": [1]},
            {"size": [2**40, 2**40], "counts": "abc"},
            True,
        )
    },
    "every box without area": _all("annotations", "bbox", [5, 5, 0, 0]),
    "every box outside": _all("annotations", "bbox", [9000, 9000, 5, 5]),
    "every box of negative size": _all("annotations", "bbox", [50, 50, -5, -5]),
    "every box a crowd": _all("annotations", "iscrowd", 1),
    "every annotation of one image": lambda c: [row.update(image_id=c["images"][0]["id"]) for row in c["annotations"]],
    "categories with other names": _all("categories", "name", "no such thing"),
    "no categories": lambda c: c.update(categories=[]),
    "two categories of one id": lambda c: c["categories"].append(dict(c["categories"][0])),
    "images is None": lambda c: c.update(images=None),
    "annotations is a dict": lambda c: c.update(annotations={}),
    "images are lists": lambda c: c.update(images=[[1]]),
}
#: What the run on the two images takes: other rows are enough, or the value is right there.
_ALLOWED = {
    "annotations.area is -5",
    "annotations.iscrowd is None",
    "every annotation of one image",
}
TEXTS: dict[str, Callable[[str], bytes]] = {
    "a list": lambda text: b"[]",
    "a number": lambda text: b"5",
    "null": lambda text: b"null",
    "UTF-16": lambda text: text.encode("utf-16"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "not UTF-8": lambda text: text.encode()[:-2] + b"\xff\xff",
    "10,000 brackets": lambda text: b"[" * 10_000 + b"]" * 10_000,
    "a number of 10,000 digits": lambda text: b'{"images": ' + b"9" * 10_000 + b"}",
    "two documents": lambda text: (text + text).encode(),
    "JSON lines": lambda text: b'{"id": 1}\n{"id": 2}\n',
    "a comma too many": lambda text: text.encode().replace(b"]", b",]", 1),
    "compressed": lambda text: zlib.compress(text.encode()),
}
_ROW = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.9}
DETECTIONS: dict[str, Any] = {
    "none": [],
    "a dict": {},
    "numbers": [1],
    "rows without a box": [{"image_id": 1, "category_id": 1, "score": 1}],
    "a NaN score": [{**_ROW, "score": math.nan}],
    "a score of text": [{**_ROW, "score": "x"}],
    "a score of None": [{**_ROW, "score": None}],
    "a NaN box": [{**_ROW, "bbox": [math.nan] * 4}],
    "an infinite box": [{**_ROW, "bbox": [0, 0, math.inf, 1]}],
    "a box of three": [{**_ROW, "bbox": [1, 2, 3]}],
    "a box of text": [{**_ROW, "bbox": "abcd"}],
    "a box of None": [{**_ROW, "bbox": None}],
    "image_id is a list": [{**_ROW, "image_id": [1]}],
    "category_id is a list": [{**_ROW, "category_id": [1]}],
    "other images": [{**_ROW, "image_id": 10**6}],
    "other categories": [{**_ROW, "category_id": 10**6}],
}


def further_data(good: Materials) -> Iterator[Case]:
    """Images, annotations, detections."""
    for kind, damage in (IMAGES | SIZES).items():
        one = partial(with_damaged_image, good=good, damage=damage, box="0,0,1,1")
        run = partial(run_with_damaged_image, good=good, damage=damage)

        def folder_of_coco(folder: Path, run: Callable[[Path], list[str]] = run) -> list[str]:
            run(folder)
            return ["--coco", "coco", "--images", "1", "--out", "out"]

        if kind != "1 x 1":  # one pixel is an image
            yield Case("data", f"image: {kind}", "compare.py", one)
        yield Case("data", f"image: {kind}", "ptq.py", run)
        if kind in IMAGES:
            yield Case("data", f"image: {kind}", "sam_tiny_stats.py", folder_of_coco)
    for kind, lie in LIES.items():

        def lying(folder: Path, lie: Callable[[dict[str, Any]], object] = lie) -> list[str]:
            content = good.annotations()
            lie(content)
            return _annotated(folder, good, json.dumps(content).encode())

        if kind not in _ALLOWED:
            yield Case("data", f"annotations: {kind}", "ptq.py", lying)
    for kind, change in TEXTS.items():

        def garbled(folder: Path, change: Callable[[str], bytes] = change) -> list[str]:
            return _annotated(folder, good, change(json.dumps(good.annotations())))

        yield Case("data", f"annotations: {kind}", "ptq.py", garbled)
    for kind, rows in DETECTIONS.items():

        def detected(folder: Path, rows: Any = rows) -> list[str]:
            (folder / "boxes.json").write_text(json.dumps(rows))
            options = ["--cfg-options", f"test_cfg.prompts={folder / 'boxes.json'}"]
            return [*_run(folder, good.coco), *options]

        yield Case("data", f"detections: {kind}", "ptq.py", detected)
    for kind, damage in kinds.FILES.items():

        def damaged(folder: Path, damage: Callable[[Path], object] = damage) -> list[str]:
            (folder / "boxes.json").write_text(json.dumps([_ROW]))
            damage(folder / "boxes.json")
            return [*_run(folder, good.coco), "--cfg-options", f"test_cfg.prompts={folder / 'boxes.json'}"]

        if kind != "all but its end":
            yield Case("data", f"detections: {kind}", "ptq.py", damaged)


def with_damaged_image(folder: Path, good: Materials, damage: Callable[[Path], object], box: str) -> list[str]:
    """Arguments of ``compare.py``."""
    path = kinds.damaged(good.image(), folder, damage)
    return [str(path), str(good.quantized[0]), "--box", box]


def run_with_damaged_image(folder: Path, good: Materials, damage: Callable[[Path], object]) -> list[str]:
    """Arguments of ``ptq.py``, on a copy of the images with one of them damaged."""
    shutil.copytree(good.coco, folder / "coco")
    damage(folder / "coco" / "images" / good.image().name)
    return _run(folder, folder / "coco")


def _run(folder: Path, coco: Path) -> list[str]:
    (folder / "config.py").write_text(config_text(coco))
    return [str(folder / "config.py"), "--work-dir", str(folder / "run")]


def _annotated(folder: Path, good: Materials, content: bytes) -> list[str]:
    (folder / "coco").mkdir()
    (folder / "coco" / "instances.json").write_bytes(content)
    os.symlink(good.coco / "images", folder / "coco" / "images")
    return _run(folder, folder / "coco")
