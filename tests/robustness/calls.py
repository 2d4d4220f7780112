# SPDX-License-Identifier: Apache-2.0
"""Calls of the Python API with arguments that cannot be right: ``calls.py NAME`` makes one, and ends as a tool does."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.export import OnnxSam, export_onnx, export_spec, load_spec, make_spec, save_spec
from ahcq_plugin.hls import HLSOptions, generate, select
from ahcq_plugin.integer import to_integer
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare, read_checkpoint, reconstruct, tune
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.checkpoints import packaged_config
from ahcq_plugin.zoo.sam import build_sam
from ahcq_plugin.zoo.sam2 import build_sam2


class Block(nn.Module):
    """An MLP with its norm."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model(blocks: int = 2) -> nn.Module:
    """Two blocks."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def items() -> list[torch.Tensor]:
    """Three items for it."""
    return list(torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)))


def small(given: Any = None, batches: Any = None, recipe: Any = "rtn", **options: Any) -> nn.Module:
    """The model quantized, with what a call changes."""
    options = {"units": Block, "progress": False, "iterations": 2} | options
    return quantize(model() if given is None else given, items() if batches is None else batches, recipe, **options)[0]


def shared(change: Callable[[nn.Module], object], recipe: str = "brecq") -> nn.Module:
    """The model after ``change``, quantized by learning."""
    given = model()
    change(given)
    return small(given, recipe=recipe)


class Short:
    """Items that are fewer than they say."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return items()[index]


def _tie(given: nn.Module) -> None:
    given[1].up.weight = given[0].up.weight


def _reuse(given: nn.Module) -> None:
    given[1].up = given[0].up


_NO_PATHS: dict[str, Any] = {"a number": 5, "a list": ["a"], "bytes": b"x", "a NUL": "a\0b", "empty": ""}
_NO_MODELS: dict[str, Any] = {"None": None, "a name": "vit_b", "a class": Block, "a function": len, "a dict": {}}


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name, and the call."""
    x, nan = items(), torch.full((2, 5, 8), math.nan)
    rtn = Recipe.from_config("rtn")
    for kind, value in {**_NO_MODELS, "without parameters": nn.Identity(), "empty": nn.Sequential()}.items():
        yield f"quantize model {kind}", lambda v=value: quantize(v, x, "rtn", progress=False)
    for kind, value in _NO_MODELS.items():
        yield f"save_quantized model {kind}", lambda v=value: save_quantized(v, "x.safetensors")
        yield f"to_integer model {kind}", lambda v=value: to_integer(v)
        yield f"export_onnx model {kind}", lambda v=value: export_onnx(v, "x.onnx", (x[0],))
        yield f"export_spec model {kind}", lambda v=value: export_spec(v, "spec", x[0])
        yield f"prepare model {kind}", lambda v=value: prepare(v, rtn)
        yield f"audit model {kind}", lambda v=value: audit(v, x[0])
        yield f"calibrate model {kind}", lambda v=value: calibrate(v, x, progress=False)
        yield f"reconstruct model {kind}", lambda v=value: reconstruct(v, x, rtn)
        yield f"freeze model {kind}", lambda v=value: freeze(v)
    for kind, given in {
        "half, items float": model().half(),
        "on meta": model().to("meta"),
        "scripted": torch.jit.script(model()),
        "lazy": nn.Sequential(Block(), nn.LazyLinear(3)),
    }.items():
        yield f"quantize model {kind}", lambda g=given: small(g)
    yield "weights shared by units", lambda: shared(_tie)
    yield "a layer shared by units", lambda: shared(_reuse)
    yield "weights shared by units, ahcq", lambda: shared(_tie, "ahcq")
    for kind, value in {
        "a dict": {"a": x[0]},
        "text": "abc",
        "a generator": (t for t in x),
        "a set": {1},
        "shorter than it says": Short(),
        "of another width": [torch.randn(2, 5, 9)],
        "of whole numbers": [torch.ones(2, 5, 8, dtype=torch.long)],
        "of NumPy": [np.zeros((2, 5, 8), np.float32)],
        "of complex numbers": [x[0] + 1j],
        "without dimensions": [torch.tensor(1.0)],
        "of None": [None],
        "infinite": [torch.full((2, 5, 8), math.inf)],
        "huge": [torch.full((2, 5, 8), 1e38)],
        "NaN": [nan],
        "second NaN": [x[0], nan],
        "second infinite": [x[0], x[1] * math.inf],
        "second of another width": [x[0], torch.randn(2, 5, 9)],
        "second None": [x[0], None],
        "second float64": [x[0], x[1].double()],
        "second a dict": [x[0], {"z": x[1]}],
        "third text": [*x[:2], "x"],
    }.items():
        for recipe in ("rtn", "qdrop"):
            yield f"quantize batches {kind}, {recipe}", lambda v=value, r=recipe: small(batches=v, recipe=r)
    for value in (5, ["rtn"], Recipe, b"rtn", {"name": "rtn", 5: 1}, {"w_bits": 4}, {"name": None}, "RTN", "", None):
        if value is not None:
            yield f"quantize recipe {value!r:.40}", lambda v=value: small(recipe=v)
        yield f"prepare recipe {value!r:.40}", lambda v=value: prepare(model(), v, units=Block)
        yield f"reconstruct recipe {value!r:.40}", lambda v=value: reconstruct(small(), x, v)
    for key in ("w_bits", "a_bits", "iterations", "seed"):
        for value in ("4", 4.0, True, -1, 10**12, [4], np.int64(4), torch.tensor(4), math.nan):
            yield f"quantize {key} {value!r}", lambda k=key, v=value: small(**{k: v})
    for value in (5, "", "no", ["0", "no"], [], [None], "[", {"0": 1}):
        yield f"quantize units {value!r}", lambda v=value: small(units=v)
    for number, value in enumerate((5, "f", lambda: 0, lambda m, i: 1 / 0, lambda m, i: m.no(i))):
        yield f"quantize forward {number}", lambda v=value: small(forward=v)
        yield f"audit forward {number}", lambda v=value: audit(small(), x[0], v)
    yield "quantize forward of nothing", lambda: small(forward=lambda m, i: None)
    for value in ("", "gpu", "cuda:9", "mps", "meta", "xla", "hip", [1], 1.5, True, torch.device("meta")):
        yield f"quantize device {value!r}", lambda v=value: small(device=v)
    for key in ("resume", "inplace", "progress"):
        for value in ("no", 1, None, []):
            yield f"quantize {key} {value!r}", lambda k=key, v=value: small(work_dir="w", **{k: v})
    yield "quantize resume without work_dir", lambda: small(resume=True)
    for value in (5, "a/b", "../x", "/abs", "", ".", None):
        yield f"quantize checkpoint {value!r}", lambda v=value: small(work_dir="w", checkpoint=v)
    for value in (5, "x", ["x"], {5: 5}, {"a": len}, {"a": {1}}, {"a": torch.zeros(2, device="meta")}):
        yield f"quantize notes {value!r:.40}", lambda v=value: small(work_dir="w", notes=v)
        yield f"save_quantized notes {value!r:.40}", lambda v=value: save_quantized(small(), "x", notes=v)
    for value in (5, "x", [5], None, ["no"], {"a": 1}):
        yield f"quantize leave {value!r}", lambda v=value: small(leave=v)
    for kind, value in {"a number": 5, "None": lambda u, r: None, "nothing": lambda u, r: u}.items():
        yield f"quantize prepare_unit {kind}", lambda v=value: small(prepare_unit=v)
    yield "quantize workers", lambda: small(workers=5)
    tuned = {"name": "rtn", "tune_steps": 2}
    for number, value in enumerate((5, lambda a, b: None, lambda a, b: 1.0, lambda a, b: a, lambda: 0)):
        yield f"quantize loss {number}", lambda v=value: small(recipe=tuned, loss=v)
    yield "quantize loss without gradient", lambda: small(recipe=tuned, loss=lambda a, b: torch.tensor(1.0))
    yield "tune without targets", lambda: tune(small(), x, [], Recipe.from_config("rtn", tune_steps=2))
    for value in ("int8", 5, None, ""):
        yield f"save_quantized outside {value!r}", lambda v=value: save_quantized(small(), "x", v)
    yield "save_quantized report", lambda: save_quantized(small(), "x", report=5)
    for kind, path in _NO_PATHS.items():
        yield f"quantize work_dir {kind}", lambda p=path: small(work_dir=p)
        yield f"save_quantized path {kind}", lambda p=path: save_quantized(small(), p)
        yield f"load_quantized path {kind}", lambda p=path: load_quantized(p)
        yield f"read_checkpoint path {kind}", lambda p=path: read_checkpoint(p)
        yield f"load_spec path {kind}", lambda p=path: load_spec(p)
        yield f"export_spec path {kind}", lambda p=path: export_spec(small(), p, x[0])
        yield f"export_onnx path {kind}", lambda p=path: export_onnx(small(), p, (x[0],))
        yield f"OnnxSam path {kind}", lambda p=path: OnnxSam(p)
        yield f"generate path {kind}", lambda p=path: generate(select(make_spec(small(), x[0])), p)
        yield f"build_sam checkpoint {kind}", lambda p=path: build_sam("sam_tiny", p)
    for kind, path in {
        "a file": "taken",
        "under a file": "taken/x",
        "a device": "/dev/null",
        "long": "x" * 300,
    }.items():
        yield f"quantize work_dir {kind}", lambda p=path: (Path("taken").touch(), small(work_dir=p))
        if kind != "a file":
            yield f"save_quantized path {kind}", lambda p=path: (Path("taken").touch(), save_quantized(small(), p))
            yield f"export_onnx path {kind}", lambda p=path: (Path("taken").touch(), export_onnx(small(), p, (x[0],)))
    for kind, build in {
        "a number": 5,
        "None": lambda state: None,
        "another model": lambda state: nn.Linear(2, 2),
        "of other width": lambda state: nn.Sequential(Block(4), Block(4)),
        "a block less": lambda state: model(1),
        "a block more": lambda state: model(3),
        "prepared": lambda state: small(),
        "a class": lambda state: Block,
        "of no arguments": lambda: model(),
        "that fails": lambda state: 1 / 0,
        "half": lambda state: model().half(),
        "on meta": lambda state: model().to("meta"),
    }.items():
        yield f"load_quantized build {kind}", lambda b=build: (save_quantized(small(), "q"), load_quantized("q", b))
    for value in (None, 5, "x", True, []):
        yield f"to_integer memory {value!r}", lambda v=value: to_integer(small(), v)
    for kind, value in {"text": "x", "of another width": torch.randn(2, 5, 9), "NaN": nan, "a list": [1]}.items():
        yield f"make_spec batch {kind}", lambda v=value: make_spec(small(), v)
    for kind, value in {"None": None, "text": "x", "empty": (), "two": (x[0], x[0]), "a list": [x[0]]}.items():
        yield f"export_onnx args {kind}", lambda v=value: export_onnx(small(), "x.onnx", v)
    for value in (5, {"input": {9: "n"}}, {"input": {-1: "n"}}, {"input": {0: 5}}, {"input": [0]}, {"zz": {0: "n"}}):
        yield f"export_onnx dynamic {value!r}", lambda v=value: export_onnx(small(), "x", (x[0],), v)
    for options in ({"style": "x"}, {"style": None}, {"style": "float"}, {"int4": "x"}, {"int4": True}):
        yield f"export_onnx {options}", lambda o=options: export_onnx(small(w_bits=8), "x", (x[0],), **o)
    for value in (5, [], "no", ["no"], [5]):
        yield f"select {value!r}", lambda v=value: select(make_spec(small(), x[0]), v)
    yield "select no spec", lambda: select(None)
    yield "save_spec no spec", lambda: save_spec(None, "spec")
    yield "generate nothing", lambda: generate([], "cpp")
    for options in ({"pe": 0}, {"pe": "8"}, {"simd": 1.5}, {"part": 5}, {"clock_mhz": math.nan}, {"out": True}):
        yield f"HLSOptions {options}", lambda o=options: HLSOptions(**o)
    for value in (None, 5, "vit_z", "", [], {}, {"image_size": 64}, "hf:", "hf:/nowhere"):
        yield f"build_sam {value!r}", lambda v=value: build_sam(v, False if isinstance(v, dict) else None)
        yield f"build_sam2 {value!r}", lambda v=value: build_sam2(v, False if isinstance(v, dict) else None)
    for build, name in ((build_sam, "sam_tiny"), (build_sam2, "sam2_tiny")):
        for key in packaged_config(name):
            for value in (-1, "x", None, math.nan, 10**9, [[1]]):
                config = packaged_config(name) | {key: value}
                yield f"{build.__name__} {key} {value!r}", lambda b=build, c=config: b(c, False)


def main() -> None:
    """Make the call of the name on the command line."""
    dict(calls())[sys.argv[1]]()


if __name__ == "__main__":
    run_tool(main)
