# SPDX-License-Identifier: Apache-2.0
"""Files that are whole and lie: checkpoints, specs and weights of the right kind whose content cannot be right."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ahcq_plugin.export import spec_io
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.files import json_checksum
from ahcq_plugin.support.safe_load import safe_load
from tests.robustness.case import Case
from tests.robustness.materials import Materials

_LAYER = "image_encoder.blocks.0.attn.qkv"
_WEIGHT, _SCALE = f"{_LAYER}.weight", f"{_LAYER}.weight_fake_quant.scale"
_NAN, _HUGE = float("nan"), 3e38


def _state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Any], object]:
    return lambda content: change(content["state_dict"])


def _filled(name: str, value: float) -> Callable[[Any], object]:
    return _state(lambda state: state.update({name: torch.full_like(state[name], value)}))


#: Changes of a quantized checkpoint, which then gets a digest that is right.
CHECKPOINTS: dict[str, Callable[[Any], object]] = {
    "no format": lambda c: c.pop("format"),
    "another format": lambda c: c.update(format="ahcq_plugin.checkpoint/9"),
    "format is a number": lambda c: c.update(format=1),
    "no recipe": lambda c: c.pop("recipe"),
    "recipe is text": lambda c: c.update(recipe="rtn"),
    "recipe of unknown key": lambda c: c["recipe"].update(no_such=1),
    "recipe of other bits": lambda c: c["recipe"].update(w_bits=99),
    "no units": lambda c: c.pop("units"),
    "units are text": lambda c: c.update(units="image_encoder.blocks.0"),
    "units are numbers": lambda c: c.update(units=[1, 2]),
    "units are empty": lambda c: c.update(units=[]),
    "unit of nothing": lambda c: c.update(units=["no.such.unit"]),
    "a unit less": lambda c: c["units"].pop(),
    "leave is a number": lambda c: c.update(leave=5),
    "leave of nothing": lambda c: c.update(leave=["no.such"]),
    "calls are a list": lambda c: c.update(calls=[]),
    "calls of garbage": lambda c: c.update(calls={"image_encoder.blocks.0": 5}),
    "calls without args": lambda c: c.update(calls={"image_encoder.blocks.0": {}}),
    "call of another shape": lambda c: c["calls"]["image_encoder.blocks.0"]["args"][0].update(tensor=[[1], [1], "x"]),
    "no state": lambda c: c.pop("state_dict"),
    "state is a list": lambda c: c.update(state_dict=[]),
    "state is empty": lambda c: c["state_dict"].clear(),
    "state of numbers": lambda c: c.update(state_dict={"x": 1}),
    "no extra": lambda c: c.pop("extra"),
    "extra is text": lambda c: c.update(extra="x"),
    "a tensor less": _state(lambda s: s.pop(_WEIGHT)),
    "a tensor more": _state(lambda s: s.update(no_such=torch.zeros(1))),
    "a tensor is a number": _state(lambda s: s.update({_WEIGHT: 1.0})),
    "weight of another shape": _state(lambda s: s.update({_WEIGHT: torch.zeros(3, 3)})),
    "weight of another dtype": _state(lambda s: s.update({_WEIGHT: s[_WEIGHT].to(torch.int8)})),
    "weight in half": _state(lambda s: s.update({_WEIGHT: s[_WEIGHT].half()})),
    "weight is NaN": _filled(_WEIGHT, _NAN),
    "weight is infinite": _filled(_WEIGHT, float("inf")),
    "weight off its grid": _state(lambda s: s.update({_WEIGHT: s[_WEIGHT] * 1.01})),
    "scale is NaN": _filled(_SCALE, _NAN),
    "scale is 0": _filled(_SCALE, 0.0),
    "scale is negative": _filled(_SCALE, -1.0),
    "scale is huge": _filled(_SCALE, _HUGE),
    "scale is empty": _state(lambda s: s.update({_SCALE: torch.zeros(0)})),
    "a bias is NaN": _filled(f"{_LAYER}.bias", _NAN),
    "a position is NaN": _filled("image_encoder.pos_embed", _NAN),
    "quantization is off": _state(
        lambda s: s.update({k: torch.zeros_like(v) for k, v in s.items() if k.endswith("fake_quant_enabled")})
    ),
}


def _saved(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = safe_load(path)
        change(content)
        save_checked(content, path)

    return damage


def _with_torch(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")


def _compressed(path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


#: Files of other kinds under the name of a checkpoint.
OTHERS: dict[str, Callable[[Path], object]] = {
    "a tensor": _with_torch(torch.zeros(3)),
    "a list": _with_torch([1, 2]),
    "a number": _with_torch(5),
    "None": _with_torch(None),
    "an empty dict": _with_torch({}),
    "a dict of numbers": _with_torch({1: 2}),
    "a state_dict of another model": _with_torch(torch.nn.Linear(2, 2).state_dict()),
    "a module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "TorchScript": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
    "NumPy's zip": lambda path: np.savez(path.open("wb"), x=np.zeros(3)),
    "NumPy's array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "another zip": _other_zip,
    "a compressed zip": _compressed,
    "safetensors of tensors": lambda path: safetensors.torch.save_file({"x": torch.zeros(3)}, path),
    "safetensors of nothing": lambda path: safetensors.torch.save_file({}, path),
    "the older format": lambda path: torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
}


def _spec_matmul(content: Any) -> Any:
    return content["units"][0]["matmuls"][0]


#: Changes of ``spec.json``, which then gets a checksum that is right.
SPECS: dict[str, Callable[[Any], object]] = {
    **{
        f"{key} is {value!r}": lambda c, key=key, value=value: _spec_matmul(c).update({key: value})
        for key in ("m", "k", "n", "batch", "accumulator_bits", "name", "kind", "layer")
        for value in (0, -1, 10**9, 1.5, True, None, "../../x", "")
        if (key, value) not in (("layer", ""), ("layer", "../../x"), ("m", 10**9), ("batch", 10**9))
    },
    **{
        f"left.{key} is {value!r}": lambda c, key=key, value=value: _spec_matmul(c)["left"].update({key: value})
        for key, values in {"bits": (0, 1, 99, -4), "scale": (0.0, -1.0, 1e39), "zero_point": (-1, 10**6, 0.5)}.items()
        for value in values
    },
    "right.bits is 99": lambda c: _spec_matmul(c)["right"].update(bits=99),
    "no matmuls": lambda c: c["units"][0].update(matmuls=[]),
    "no units": lambda c: c.update(units=[]),
    "a unit twice": lambda c: c["units"].append(c["units"][0]),
    "a matmul twice": lambda c: c["units"][0]["matmuls"].append(_spec_matmul(c)),
    "name of a unit is a path": lambda c: c["units"][0].update(name="../../../tmp/x"),
    "name of a unit is empty": lambda c: c["units"][0].update(name=""),
    "tensors is a path": lambda c: c.update(tensors="../../x.safetensors"),
    "sha256 is another": lambda c: c.update(sha256="0" * 64),
    "sha256 is a number": lambda c: c.update(sha256=5),
    "left_out is text": lambda c: c.update(left_out="x"),
    "steps are text": lambda c: c["units"][0].update(steps="x"),
    "the checksum is another": lambda c: c.update(checksum="0" * 64),
    "the checksum is a number": lambda c: c.update(checksum=5),
}


def lying_files(good: Materials) -> Iterator[Case]:
    """Each in the tools that read it."""
    pth = good.quantized[0]
    readers: dict[str, Callable[[Path], list[str]]] = {
        "export.py": lambda path: [str(path), "-o", "out"],
        "time_image.py": lambda path: [str(path), "--repeats", "1"],
        "compare.py": lambda path: [str(good.image()), str(path), "--box", "9,9,50,50"],
    }
    for tool, argv in readers.items():
        changes = {kind: _saved(change) for kind, change in CHECKPOINTS.items()}
        for kind, damage in {**(changes if tool == "export.py" else {}), **OTHERS}.items():

            def prepare(folder: Path, damage: Callable[[Path], object] = damage, argv: Any = argv) -> list[str]:
                path = folder / pth.name
                shutil.copy(pth, path)
                damage(path)
                return argv(path)

            yield Case("lies", f"checkpoint: {kind}", tool, prepare)
    weights: dict[str, Callable[[Any], Any]] = {
        "NaN": lambda s: s | {_WEIGHT: torch.full_like(s[_WEIGHT], _NAN)},
        "infinite": lambda s: s | {_WEIGHT: torch.full_like(s[_WEIGHT], -float("inf"))},
        "a NaN among positions": lambda s: s | {"image_encoder.pos_embed": s["image_encoder.pos_embed"] * _NAN},
        "without one": lambda s: {k: v for k, v in s.items() if k != _WEIGHT},
        "with one more": lambda s: s | {"x": torch.zeros(1)},
        "of another shape": lambda s: s | {_WEIGHT: s[_WEIGHT].T.contiguous()},
        "a list": lambda s: list(s.values()),
        "of numbers": lambda s: dict.fromkeys(s, 1.0),
        "complex": lambda s: s | {_WEIGHT: s[_WEIGHT].to(torch.complex64)},
        "whole numbers": lambda s: s | {_WEIGHT: s[_WEIGHT].to(torch.int64)},
        "under module.": lambda s: {f"module.{k}": v for k, v in s.items()},
        "under state_dict": lambda s: {"state_dict": s},
        "under model, and epoch": lambda s: {"model": s, "epoch": 3},
        "keys are numbers": lambda s: dict(enumerate(s.values())),
    }
    for kind, change in weights.items():

        def given(folder: Path, change: Callable[[Any], Any] = change) -> list[str]:
            torch.save(change(dict(safe_load(good.weights))), folder / "w.pth")
            argv = [str(good.config), "--work-dir", str(folder / "run")]
            return [*argv, "--cfg-options", f"sam.checkpoint={folder / 'w.pth'}"]

        yield Case("lies", f"weights: {kind}", "ptq.py", given)
    for kind, change in SPECS.items():

        def lying(folder: Path, kind: str = kind, change: Callable[[Any], object] = change) -> list[str]:
            shutil.copytree(good.spec, folder / "spec")
            path = folder / "spec" / spec_io.SPEC_FILE
            content = json.loads(path.read_text())
            change(content)
            if "checksum" not in kind:
                content["checksum"] = json_checksum(content)
            path.write_text(json.dumps(content))
            return [str(folder / "spec"), "-o", str(folder / "cpp"), "--layers", "image_encoder.blocks.0*"]

        yield Case("lies", f"spec: {kind}", "make_hls.py", lying)
