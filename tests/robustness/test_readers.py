# SPDX-License-Identifier: Apache-2.0
"""Readers of files, each on content that is whole and wrong: an error in words of ours, none from inside a library.

The wrong content is drawn at random from fixed seeds (``mutations.py``), beside what once was found to go through.
"""

from __future__ import annotations

import io
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ahcq_plugin.hls import flow
from ahcq_plugin.mm.data.prompts import Detections
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies import challenges
from ahcq_plugin.studies.inference.page import read_rows, table
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.tool import is_foreseen
from ahcq_plugin.zoo.coco import check_coco, read_content
from ahcq_plugin.zoo.images import check_header, image_size
from ahcq_plugin.zoo.items import coco_items
from ahcq_plugin.zoo.scenes import write_coco
from ahcq_plugin.zoo.videos import _read_png, read_videos, write_clips
from tests.robustness.calls import small
from tests.robustness.mutations import mutated

_SEEDS = 150
_PART = {"boxes": 0, "least": 1.0, "median": 2.0, "ratio": 1.0, "peak": 5}
_ROW = {"runtime": "a", "computes": "b", "parts": [_PART], "bytes": 5, "iou": 1.0, "masks": 2, "load": 0.1, "error": ""}
_DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.9}
_RECIPE = {"name": "qdrop", "iterations": 2, "tune_steps": 2}


def refused_or_read(call: Callable[[], object], how: str) -> None:
    """An error must be one that a tool tells in one line."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - which it is, is what is looked at
        assert is_foreseen(error), f"{how}: {error!r}"


def _cell(path: Path) -> object:
    return challenges.read_cell(path.parent, challenges.Cell("none", challenges.CALIBRATED[0]))


#: Name of a file -> what it holds, and its reader.
_JSON: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "none-rtn.json": ({"key": "x", "iou": [[0.5, 1.0], []], "seconds": 1.5}, _cell),
    "m/rows.json": (
        {"threads": 1, "rows": [_ROW, {**_ROW, "runtime": "c"}]},
        lambda path: [table(rows) for rows in read_rows(path.parent.parent).values()],
    ),
    "layers.json": (
        {"format": "ahcq_plugin.hls/1", "layers": [{"top": "a", "k": 1}, {"top": "b", "k": 2}]},
        lambda path: flow.write_report(path.parent, {}),
    ),
    "detections.json": ([_DETECTION, _DETECTION], lambda path: Detections(path, [1])[1]),
}


@pytest.mark.parametrize("name", _JSON)
def test_json_that_is_wrong_in_one_place(name: str, tmp_path: Path) -> None:
    content, read = _JSON[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "layers.json":
        content = {**content, "format": flow.FORMAT}
    path.write_text(json.dumps(content))
    read(path)  # as it is, it is right
    for text in ("", "x", "[" * 100_000, "5", "[5]", "{}", "9" * 5000):
        path.write_text(text)
        refused_or_read(lambda: read(path), text[:9])
    for seed in range(_SEEDS):
        wrong, how = mutated(content, random.Random(seed))
        path.write_text(json.dumps(wrong))
        refused_or_read(lambda: read(path), how)


def test_annotations_that_are_wrong_in_one_place(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 1, size=32)
    content = json.loads(path.read_text())
    for seed in range(_SEEDS):
        wrong, how = mutated(content, random.Random(seed))
        path.write_text(json.dumps(wrong))
        refused_or_read(lambda: check_coco(str(path), str(path.parent / "images"), masks=True), how)
        refused_or_read(lambda: list(coco_items(path.parent)), how)


def test_annotations_without_iscrowd_are_read_and_mixed_ids_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 1, size=32)
    content = json.loads(path.read_text())
    expected = [item.boxes.tolist() for item in coco_items(path.parent)]
    del content["annotations"][0]["iscrowd"]
    path.write_text(json.dumps(content))
    assert [item.boxes.tolist() for item in coco_items(path.parent)] == expected
    content["images"].append({**content["images"][0], "id": "x"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ids that are numbers and ids that are texts"):
        read_content(path)


def test_an_image_of_another_size_than_its_row_says(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 1, size=32)
    content = json.loads(path.read_text())
    content["images"][0]["height"] = 10**9
    content["annotations"] = [{**row, "segmentation": [[1, 1, 9, 1, 9, 9]]} for row in content["annotations"]]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has \(32, 32\) pixels \(H, W\), its row says \(1000000000, 32\)"):
        list(coco_items(path.parent))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "PPM", "ICO", "TIFF", "GIF", "BMP", "WEBP"])
def test_images_with_damaged_bytes(form: str, tmp_path: Path) -> None:
    """Pillow raises anything: ValueError for numbers of a PPM, SyntaxError for EXIF data, ..."""
    exif, whole, path = Image.Exif(), io.BytesIO(), tmp_path / "x.png"
    exif[0x112], exif[0x10E] = 6, "x" * 20
    options = {"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}
    Image.new("RGB", (20, 16), (90, 20, 30)).save(whole, form, **options)
    for seed in range(_SEEDS):
        chance, content = random.Random(f"{form} {seed}"), bytearray(whole.getvalue())
        for _ in range(chance.choice((1, 2, 8))):
            content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
        path.write_bytes(bytes(content))
        refused_or_read(partial(check_header, path, (16, 20)), f"{form} {seed}")
        refused_or_read(partial(_read_small, path), f"{form} {seed}")


def _read_small(path: Path) -> None:
    height, width = image_size(path)
    if height * width < 10**5:
        _read_png(path)


@pytest.mark.parametrize("name", ["rtn", "ahcq", "saqsam"])
def test_recipes_that_are_wrong_in_one_place(name: str) -> None:
    content = Recipe.from_config(name).to_dict()
    for seed in range(_SEEDS):
        wrong, how = mutated(content, random.Random(seed))
        refused_or_read(partial(Recipe.from_config, wrong), how)


def test_what_a_run_keeps_is_checked(tmp_path: Path) -> None:
    """By keys, types and shapes; whatever is damaged otherwise its digest tells."""
    small(recipe=_RECIPE, work_dir=tmp_path)
    for name in ("calibrated.pt", "units/001.pt", "tuned.pt"):
        path = tmp_path / name
        content = safe_load(path)
        for wrong in (
            *([], {}, 5, {**content, "x": 1}, {**content, "fingerprint": 5}, dict.fromkeys(content)),
            *(_with_shapes(content[key], content, key) for key in ("state", "parameters") if key in content),
        ):
            save_checked(wrong, path)
            with pytest.raises(ValueError, match=name) as caught:
                small(recipe=_RECIPE, work_dir=tmp_path, resume=True)
            assert is_foreseen(caught.value)
        save_checked(content, path)
    small(recipe=_RECIPE, work_dir=tmp_path, resume=True)


def _with_shapes(value: Any, content: dict[str, Any], key: str) -> dict[str, Any]:
    """``content`` whose tensors under ``key`` are empty."""
    empty = {n: t[:0] for n, t in value.items()} if isinstance(value, dict) else [torch.zeros(0) for _ in value]
    return {**content, key: empty}


def test_generated_data_with_damaged_marks(tmp_path: Path) -> None:
    for made, mark in (
        (lambda: write_coco(tmp_path / "scenes", 1, size=32), tmp_path / "scenes" / "instances.json"),
        (lambda: write_clips(tmp_path / "clips", 1, frames=2, size=32), tmp_path / "clips" / "made_by.json"),
    ):
        made()
        for text in ("", "[]", "5", "{"):
            mark.write_text(text)
            with pytest.raises((ValueError, FileExistsError), match="delete") as caught:
                made()
            assert is_foreseen(caught.value)


def test_objects_of_sav_are_numbers(tmp_path: Path) -> None:
    for part, name in (("JPEGImages_24fps/v", "00000.jpg"), ("Annotations_6fps/v/one", "00000.png")):
        (tmp_path / part).mkdir(parents=True)
        Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / part / name)
    (video,) = read_videos(tmp_path, "sav")
    with pytest.raises(ValueError, match="objects are folders named by numbers"):
        video.check()


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    code = (
        "import resource, torch; from ahcq_plugin.support.checked import save_checked\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save_checked({'x': torch.zeros(90_000)}, 'x.pth')\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "5 x.pth\n" and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize("write", [write_coco, write_clips])
def test_names_that_are_not_utf8_are_refused(write: Callable[..., object], tmp_path: Path) -> None:
    """OpenCV crashes on them."""
    with pytest.raises(ValueError, match="is not UTF-8"):
        write(f"{tmp_path}/caf\udcff", 1)
