# SPDX-License-Identifier: Apache-2.0
"""A machine without room, names that are not UTF-8, and files that only developers' tools read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.robustness import kinds
from tests.robustness.case import DEMO, Case
from tests.robustness.materials import Materials
from tests.robustness.tool_cases import call
from tests.robustness.zygote import SETUPS

_LAYERS = ["--layers", "image_encoder.blocks.0"]
_NOT_UTF8 = os.fsdecode(b"caf\xff")
_TRAINING = ["--scenes-only", "--steps", "1", "--batch", "1"]


def _always(argv: list[str]) -> Callable[[Path], list[str]]:
    return lambda folder: argv


def _writers(good: Materials, out: str) -> dict[str, list[str]]:
    """Tools that write to ``out``."""
    return {
        "ptq.py": [DEMO, "--dry-run", "--work-dir", out],
        "export.py": [str(good.quantized[0]), "-o", out],
        "make_hls.py": [str(good.spec), "-o", out, *_LAYERS],
        "compare.py": [*call("compare.py", good), "--out", out],
        "export_bundle.py": [str(good.quantized[0]), "-o", out, "--images", "1", "--runtimes"],
        "train_sam_tiny.py": [*_TRAINING, "--out", out],
        "train_sam2_tiny.py": [*_TRAINING, "--out", out],
        "sam_tiny_stats.py": ["--images", "1", "--out", out],
        "plot_distributions.py": ["--images", "1", "--boxes", "1", "--out", out],
        "eval_sam_tiny.py": ["--out", out],
        "convert_yolox.py": ["nowhere.onnx", out],
        "coverage_table.py": ["--models", "sam_tiny", "--out", out],
        "hw_model.py": ["--models", "vit_b", "--json", out],
        "bench_range_search.py": ["--json", out],
        "challenges.py": ["--folder", out],
        "results_table.py": ["--folder", out],
        "fetch_weights.py": ["--list", "--folder", out],
    }


def machines(good: Materials) -> Iterator[Case]:
    """No room for files, no room for what is printed, names that some libraries cannot take."""
    roomless = ("export.py", "make_hls.py", "compare.py", "train_sam_tiny.py", "sam_tiny_stats.py")
    printers = ("export.py", "hw_model.py", "fetch_weights.py")
    for setup in SETUPS:
        for tool in printers if "print" in setup else roomless[: 4 if "100" in setup else 5]:  # the last writes little
            argv = _writers(good, "out")[tool]
            yield Case("machine", f"{setup}", tool, _always(argv), setup=setup)
    for tool, argv in _writers(good, _NOT_UTF8).items():
        yield Case("machine", "a name that is not UTF-8", tool, _always(argv))
    for text in (f"{key}.dataset.data_root={_NOT_UTF8}" for key in ("test_dataloader", "test_cfg.calib")):
        yield Case("machine", ascii(text), "ptq.py", _always([DEMO, "--work-dir", "run", "--cfg-options", text]))
    files = {"compare.py", "convert_yolox.py", "coverage_table.py", "hw_model.py", "bench_range_search.py"}
    for tool, argv in _writers(good, "taken").items():

        def taken(folder: Path, tool: str = tool, argv: list[str] = argv) -> list[str]:
            (folder / "taken").mkdir() if tool in files else (folder / "taken").write_text("")
            return argv

        yield Case("machine", f"what it writes to is a {'folder' if tool in files else 'file'}", tool, taken)


#: What is in the place of a JSON file or of a config.
_CONTENTS = {"noise": b"\x93\xff\x00", "empty": b"", "text": b"x", "list": b"[5]", "number": b"5", "object": b"{}"}


def studied(good: Materials) -> Iterator[Case]:
    """Files that only developers' tools read, and what trainings go on from."""

    def holding(name: str, content: bytes, argv: list[str]) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            return argv

        return prepare

    cells = {
        "no key": {"iou": [[0.5]], "seconds": 1},
        "iou of text": {"key": "x", "iou": ["x"], "seconds": 1},
        "iou of 2": {"key": "x", "iou": [[2.0]], "seconds": 1},
        "iou of nothing": {"key": "x", "iou": [], "seconds": 1},
    }
    contents = {**_CONTENTS, **{kind: json.dumps(cell).encode() for kind, cell in cells.items()}}
    for kind, content in contents.items():
        yield Case("studies", f"cell: {kind}", "challenges.py", holding("f/none-rtn.json", content, ["--folder", "f"]))
    for kind, content in _CONTENTS.items():
        for tool, argv in {
            "fetch_weights.py": ["c.py"],
            "results_table.py": ["--config", "c.py"],
            "convert_hdetr.py": [str(good.weights), "out.pth", "--config", "c.py"],
        }.items():
            yield Case("studies", f"config: {kind}", tool, holding("c.py", content, argv))
    for tool in ("train_sam_tiny.py", "train_sam2_tiny.py"):
        argv = [*_TRAINING, "--out", "out", "--resume"]
        for kind, damage in (kinds.FILES | kinds.PICKLES).items():
            if kind in ("missing", "folder", "link to itself", "pipe"):  # then it begins anew
                continue

            def gone_on(folder: Path, damage: Any = damage, argv: list[str] = argv) -> list[str]:
                (folder / "out").mkdir()
                kinds.damaged(good.weights, folder / "out", damage).rename(folder / "out" / "state.pth")
                return argv

            yield Case("studies", f"--resume: {kind}", tool, gone_on)

        def another(folder: Path, argv: list[str] = argv) -> list[str]:
            (folder / "out").mkdir()
            shutil.copy(good.weights, folder / "out" / "state.pth")
            return argv

        yield Case("studies", "--resume: other tensors", tool, another)
    for kind, content in _CONTENTS.items():
        if kind == "list":
            continue

        def detections(folder: Path, content: bytes = content) -> list[str]:
            shutil.copytree(good.coco, folder / "coco")
            (folder / "coco" / "yolox_nano_bbox.json").write_bytes(content)
            return ["--coco", "coco", "--out", "out"]

        yield Case("studies", f"detections: {kind}", "eval_sam_tiny.py", detections)
    for kind, model in _graphs().items():
        yield Case("studies", f"ONNX: {kind}", "convert_yolox.py", holding("x.onnx", model, ["x.onnx", "out.pth"]))
    for config in ("", "nowhere.py", "../../setup.py", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"):
        argv = ["x.onnx", "out.pth", "--config", config]
        yield Case("studies", f"--config {config}", "convert_yolox.py", holding("x.onnx", b"", argv))


def _graphs() -> dict[str, bytes]:
    """ONNX files that are whole, and no YOLOX."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    bias = numpy_helper.from_array(np.zeros(4, np.float32), "b")
    nan = numpy_helper.from_array(np.full((4, 3, 3, 3), np.nan, np.float32), "w")
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3, 3, 3], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3, 3, 3], raw_data=b"\0" * 8)
    whole = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.int64), "w")

    def conv(inputs: list[str], *tensors: Any) -> bytes:
        node = helper.make_node("Conv", inputs, ["y"], name="conv")
        graph = helper.make_graph([node], "g", [], [], list(tensors))
        return helper.make_model(graph).SerializeToString()

    return {
        "another model": conv(["x", "w", "b"], weight, bias),
        "no bias": conv(["x", "w"], weight),
        "no weights": conv(["x", "w", "b"]),
        "NaN": conv(["x", "w", "b"], nan, bias),
        "weights elsewhere": conv(["x", "w", "b"], outside, bias),
        "weights cut off": conv(["x", "w", "b"], short, bias),
        "whole numbers": conv(["x", "w", "b"], whole, bias),
        "no graph": onnx.ModelProto().SerializeToString(),
    }
