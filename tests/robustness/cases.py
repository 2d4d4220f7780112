# SPDX-License-Identifier: Apache-2.0
"""Kind by place: every setting with values of a wrong type, every file damaged in every way, data that lie."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ahcq_plugin.ptq import Recipe
from tests.robustness import kinds
from tests.robustness.calls import calls
from tests.robustness.case import DEMO, Case, config_with
from tests.robustness.config_cases import benches, further_configs
from tests.robustness.data_cases import further_data, run_with_damaged_image, with_damaged_image
from tests.robustness.file_cases import lying_files
from tests.robustness.machine_cases import machines, studied
from tests.robustness.materials import Materials, config_text
from tests.robustness.tool_cases import folders, options, videos
from tests.robustness.zygote import PYTHON


def all_cases(good: Materials) -> list[Case]:
    """Every case; a control in each group, whose input is good."""
    groups = (
        *(recipe_values, loop_values, configs, checkpoints, annotations, images, specs, options, folders, videos),
        *(further_configs, benches, lying_files, further_data, machines, studied, python_calls),
    )
    return [case for group in groups for case in group(good)]


def python_calls(good: Materials) -> Iterator[Case]:
    """Calls of the Python API."""
    for name, _ in calls():
        yield Case("python", name, PYTHON, lambda folder, name=name: [name])


def recipe_values(good: Materials) -> Iterator[Case]:
    """Every key of a recipe."""
    yield Case("recipe", "good", "ptq.py", config_with("recipe = dict(iterations=1)"), control=True)
    types = {"int": int, "float": float, "bool": bool, "str": str}
    for field in dataclasses.fields(Recipe):
        kind = types.get(str(field.type), dict)
        for value in kinds.VALUES[kind]:
            yield Case("recipe", f"{field.name}={value}", "ptq.py", config_with(f"recipe = dict({field.name}={value})"))
        if kind is float:
            yield Case("recipe", f"{field.name}=1e30", "ptq.py", config_with(f"recipe = dict({field.name}=1e30)"))
        if str(field.type) == "Sequence[str]":
            for value in ("None", "[]", "['']", "['no.such']", "[None]", "[['*']]", "['*', 5]"):
                text = f"recipe = dict(tune_steps=1, {field.name}={value})"
                if value != "[]":  # all
                    yield Case("recipe", f"{field.name}={value}", "ptq.py", config_with(text))
    for key in ("w_bits", "a_bits"):
        for value in ("0", "1", "9", "64"):
            yield Case("recipe", f"{key}={value}", "ptq.py", config_with(f"recipe = dict({key}={value})"))


#: Settings of the loop and of its parts -> their type.
_LOOP: dict[str, type] = {
    **dict.fromkeys(("max_boxes", "box_chunk", "calib.num_images", "calib.max_boxes", "calib.seed"), int),
    "calib.tune_images": int,
    "score_thr": float,
    **dict.fromkeys(("prompts", "toolkit", "device"), str),
    "resume": bool,
    **dict.fromkeys(("calib", "everything"), dict),
}


def loop_values(good: Materials) -> Iterator[Case]:
    """Every key of the test loop."""
    yield Case("loop", "good", "ptq.py", config_with("test_cfg = dict(max_boxes=3)"), control=True)
    allowed = {
        ("prompts", "'no such'"),
        ("prompts", "''"),
        ("everything", "None"),
        ("device", "None"),
        ("calib.max_boxes", "None"),
        ("calib.tune_images", "None"),
        ("calib", "None"),
    }
    for key, kind in _LOOP.items():
        for value in kinds.VALUES[kind]:
            if (key, value) in allowed:
                continue
            *outer, last = key.split(".")
            text = f"{last}={value}"
            for name in reversed(outer):
                text = f"{name}=dict({text})"
            yield Case("loop", f"{key}={value}", "ptq.py", config_with(f"test_cfg = dict({text})"))
    for value in ("cuda", "cuda:99", "mps", "meta", "xla", "gpu"):
        yield Case("loop", f"device {value}", "ptq.py", config_with("", ("--dry-run", "--device", value)))
    for name in ("recipe", "test_cfg", "sam", "model", "test_dataloader"):
        for value in ("dict(_delete_=True, no_such_key=1)", "5", "'no such'", "[1, 2]"):
            yield Case("loop", f"{name} = {value}", "ptq.py", config_with(f"{name} = {value}"))


def configs(good: Materials) -> Iterator[Case]:
    """The config as a file, which is a program."""
    yield Case("config", "good", "ptq.py", config_with(""), control=True)
    for kind, damage in kinds.FILES.items():

        def prepare(folder: Path, damage: Callable[[Path], None] = damage) -> list[str]:
            return [str(kinds.damaged(good.config, folder, damage)), "--dry-run", "--work-dir", str(folder / "run")]

        if kind != "half" and kind != "all but its end":
            yield Case("config", kind, "ptq.py", prepare)
    texts = {
        "syntax": "recipe = dict(",
        "raises": "1 / 0",
        "exits": "import sys\nsys.exit(0)",
        "unknown base": "_base_ = './nowhere.py'",
        "its own base": "_base_ = './leaf.py'",
        "no PTQ config": "model = dict(type='FasterRCNN')",
        "unknown key of the SAM": "sam = dict(no_such=1)",
        "unknown SAM": "sam = dict(name='vit_z')",
        "unknown model": "model = dict(type='NoSuchDetector')",
        "unknown data set": "test_dataloader = dict(dataset=dict(type='NoSuchSet'))",
        "unknown loop": "test_cfg = dict(type='NoSuchLoop')",
        "units that match nothing": "test_cfg = dict(units=['no.such.*'])",
        "without that matches nothing": "recipe = dict(without=dict(lnq=['no.such.*']))",
        "leave that matches nothing": "test_cfg = dict(leave=['no.such.*'])",
        "misspelt": "recipie = dict(name='rtn')",
    }
    for kind, text in texts.items():
        prefix = "" if "base" in kind or kind == "no PTQ config" else f"_base_ = {DEMO!r}\n"

        def prepare(folder: Path, text: str = prefix + text) -> list[str]:
            (folder / "leaf.py").write_text(text + "\n")
            return [str(folder / "leaf.py"), "--dry-run", "--work-dir", str(folder / "run")]

        yield Case("config", kind, "ptq.py", prepare)
    for kind, text in {
        "unknown key of the data set": "test_dataloader = dict(dataset=dict(no_such_key=1))",
        "unknown file of detections": "test_cfg = dict(prompts='no such')",
    }.items():
        yield Case("config", kind, "ptq.py", config_with(text, ()))
    for kind, path in {"a file": "taken", "under a file": "taken/run", "too long": "x" * 300}.items():

        def prepare(folder: Path, path: str = path) -> list[str]:
            (folder / "taken").write_text("")
            return [DEMO, "--dry-run", "--work-dir", str(folder / path)]

        yield Case("config", f"work dir is {kind}", "ptq.py", prepare)


def checkpoints(good: Materials) -> Iterator[Case]:
    """Every tool that reads a model."""
    readers: dict[str, Callable[[Path, Path], list[str]]] = {
        "export.py": lambda path, folder: [str(path), "-o", str(folder / "out")],
        "evaluate.py": lambda path, folder: [str(good.config), str(path), "--work-dir", str(folder)],
        "compare.py": lambda path, folder: [str(good.image()), str(path), "--box", "9,9,50,50"],
        "time_image.py": lambda path, folder: [str(path), "--repeats", "1"],
        "compare_golden.py": lambda path, folder: [str(path), str(good.spec), "--images", "1"],
        "export_bundle.py": lambda path, folder: [str(path), "-o", str(folder / "out"), "--images", "1", "--runtimes"],
    }
    for tool, argv in readers.items():
        for source in good.quantized:
            if tool != "compare_golden.py":  # minutes
                yield Case(
                    "checkpoint", f"good {source.suffix}", tool, _with(source, argv, lambda path: None), control=True
                )
            files = kinds.FILES | kinds.CHECKED | (kinds.PICKLES if source.suffix == ".pth" else {})
            for kind, damage in files.items():
                yield Case("checkpoint", f"{source.suffix} {kind}", tool, _with(source, argv, damage))
        yield Case("checkpoint", "of floating point", tool, _with(good.weights, argv, _whole))

    def weights(path: Path, folder: Path) -> list[str]:
        options = ("--cfg-options", f"sam.checkpoint={path}")
        return [str(good.config), "--work-dir", str(folder / "run"), *options]

    for kind, damage in (kinds.FILES | kinds.PICKLES).items():
        yield Case("checkpoint", f"sam.checkpoint {kind}", "ptq.py", _with(good.weights, weights, damage))
    yield Case(
        "checkpoint", "sam.checkpoint of a quantized model", "ptq.py", _with(good.quantized[0], weights, lambda p: None)
    )


def _whole(path: Path) -> None:
    """No damage."""


def _with(
    source: Path, argv: Callable[[Path, Path], list[str]], damage: Callable[[Path], None]
) -> Callable[[Path], list[str]]:
    return lambda folder: argv(kinds.damaged(source, folder, damage), folder)


def _set(place: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[place][0].__setitem__(key, value)


def _drop(place: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[place][0].pop(key)


_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no images": lambda content: content.pop("images"),
    "no annotations": lambda content: content.pop("annotations"),
    "no categories": lambda content: content.pop("categories"),
    "images are text": lambda content: content.update(images="x"),
    "rows are text": lambda content: content.update(annotations=["x"]),
    "image twice": lambda content: content["images"].append(dict(content["images"][0])),
    "annotation id twice": lambda content: content["annotations"].append(dict(content["annotations"][0])),
    "no file_name": _drop("images", "file_name"),
    "file_name is a number": _set("images", "file_name", 7),
    "file_name of no file": _set("images", "file_name", "nowhere.png"),
    "file_name of the folder": _set("images", "file_name", ""),
    "height is text": _set("images", "height", "x"),
    "height is wrong": _set("images", "height", 7),
    "no image_id": _drop("annotations", "image_id"),
    "image_id of no image": _set("annotations", "image_id", 10**6),
    "no bbox": _drop("annotations", "bbox"),
    "bbox of three": _set("annotations", "bbox", [1, 2, 3]),
    "bbox is text": _set("annotations", "bbox", ["a", "b", "c", "d"]),
    "bbox is NaN": _set("annotations", "bbox", [math.nan] * 4),
    "bbox is infinite": _set("annotations", "bbox", [0, 0, math.inf, 5]),
    "bbox is None": _set("annotations", "bbox", None),
    "no segmentation": _drop("annotations", "segmentation"),
    "segmentation is text": _set("annotations", "segmentation", "x"),
    "segmentation is a number": _set("annotations", "segmentation", 5),
    "polygon of three numbers": _set("annotations", "segmentation", [[1, 2, 3]]),
    "polygon with NaN": _set("annotations", "segmentation", [[math.nan] * 8]),
    "polygon of text": _set("annotations", "segmentation", [["a"] * 8]),
    "RLE of another size": _set("annotations", "segmentation", {"size": [3, 3], "counts": [9]}),
    "RLE without counts": _set("annotations", "segmentation", {"size": [256, 256]}),
    "RLE of noise": _set("annotations", "segmentation", {"size": [256, 256], "counts": "\x7f~~~!!"}),
    "RLE with negative counts": _set("annotations", "segmentation", {"size": [256, 256], "counts": [-5, 65541]}),
    "RLE of a huge image": _set("annotations", "segmentation", {"size": [10**6, 10**6], "counts": [10**12]}),
    "category of none": _set("annotations", "category_id", 99),
    "category is text": _set("annotations", "category_id", "x"),
}


def annotations(good: Materials) -> Iterator[Case]:
    """The JSON of a data set, for a run and for what reads boxes of an image."""

    def run(folder: Path) -> list[str]:
        (folder / "config.py").write_text(config_text(folder))
        return [str(folder / "config.py"), "--work-dir", str(folder / "run")]

    def boxes(folder: Path) -> list[str]:
        return [str(good.image()), str(good.quantized[0]), "--annotations", str(folder / "instances.json")]

    def study(folder: Path) -> list[str]:
        return ["--coco", str(folder), "--calibration", "1", "--images", "1", "--recipe", "rtn"]

    def lying(argv: Callable[[Path], list[str]], lie: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            content = good.annotations()
            lie(content)
            (folder / "instances.json").write_text(json.dumps(content))
            (folder / "images").symlink_to(good.coco / "images")
            return argv(folder)

        return prepare

    def broken(argv: Callable[[Path], list[str]], damage: Callable[[Path], None]) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            kinds.damaged(good.coco / "instances.json", folder, damage)
            (folder / "images").symlink_to(good.coco / "images")
            return argv(folder)

        return prepare

    #: What another reader than the run does not look at.
    needless = {
        "compare.py": {"no categories", "annotation id twice", "file_name is a number", "height is text",
                       "height is wrong",
                       "category of none", "category is text", "image_id of no image", "no file_name",
                       "file_name of no file", "file_name of the folder"}
        | {name for name in _LIES if name.startswith(("RLE", "polygon", "segmentation", "no segmentation"))},
        "role_sensitivity.py": {"no categories", "category of none", "category is text",
                                "height is text", "annotation id twice", "image_id of no image"},
    }  # fmt: skip
    for tool, argv in (("ptq.py", run), ("compare.py", boxes), ("role_sensitivity.py", study)):
        if tool != "role_sensitivity.py":  # minutes
            yield Case("annotations", "good", tool, lying(argv, lambda content: None), control=True)
        for kind, lie in _LIES.items():
            if kind not in needless.get(tool, ()):
                yield Case("annotations", kind, tool, lying(argv, lie))
        for kind, damage in kinds.FILES.items():
            yield Case("annotations", f"file {kind}", tool, broken(argv, damage))


def images(good: Materials) -> Iterator[Case]:
    """An image, of a run and on a command line."""
    for kind, damage in kinds.FILES.items():
        if kind == "all but its end":  # a PNG without its last bytes is whole
            continue
        one = partial(with_damaged_image, good=good, damage=damage, box="9,9,50,50")
        yield Case("image", kind, "compare.py", one)
        yield Case("image", kind, "ptq.py", partial(run_with_damaged_image, good=good, damage=damage))
    for box in ("1,2,3", "a,b,c,d", "nan,0,5,5", "5,5,1,1", "", "-9,-9,-5,-5", "1e9,1e9,2e9,2e9"):
        argv = [str(good.image()), str(good.quantized[0]), f"--box={box}"]
        yield Case("image", f"box {box}", "compare.py", lambda folder, argv=argv: argv)


def specs(good: Materials) -> Iterator[Case]:
    """The folder of a spec."""

    def generate(folder: Path) -> list[str]:
        return [str(folder / "spec"), "-o", str(folder / "cpp"), "--layers", "image_encoder.blocks.0"]

    def copied(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            shutil.copytree(good.spec, folder / "spec")
            change(folder / "spec")
            return generate(folder)

        return prepare

    yield Case("spec", "good", "make_hls.py", copied(lambda spec: None), control=True)
    for file in sorted(path.name for path in good.spec.iterdir() if path.is_file()):
        for kind, damage in (kinds.FILES | kinds.CHECKED).items():
            yield Case("spec", f"{file} {kind}", "make_hls.py", copied(lambda spec, f=file, d=damage: d(spec / f)))
    options = [["--layers", pattern] for pattern in ("no.such.unit", "", "[", "image_encoder.blocks.0.no_such")]
    for option in ("--pe", "--simd", "--out-floats", "--clock-mhz"):
        few = ["--layers", "image_encoder.blocks.0.attn_qkv"]
        options += [[f"{option}={value}", *few] for value in (*kinds.numbers(int), "0", "100000000")]
    for argv in options:

        def with_options(folder: Path, argv: list[str] = argv) -> list[str]:
            return [str(good.spec), "-o", str(folder / "cpp"), *argv]

        yield Case("spec", " ".join(argv), "make_hls.py", with_options)
