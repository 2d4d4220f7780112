# SPDX-License-Identifier: Apache-2.0
"""Specs on disk: a folder of ``spec.json`` and one safetensors file.

``spec.json`` holds the format, every name and number, the name and SHA-256 of the tensor file, and a checksum of all
that, which files of before it lack. Arrays are tensors
named ``unit/matmul/field`` or ``unit/matmul/side/field``; the codes of weights are packed (``packing``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ahcq_plugin.export.matmul import Matmul, Patches
from ahcq_plugin.export.operands import OPERANDS, SpecError, WeightOperand
from ahcq_plugin.export.packing import pack, unpack
from ahcq_plugin.export.spec import Spec, Step, UnitSpec
from ahcq_plugin.support.files import given_path, json_checksum, replacing, unique_keys

FORMAT = "ahcq_plugin.spec/2"
FORMER_FORMAT = "ahcq_plugin.spec/1"  # no operands per head, no groups of convolutions; still read
SPEC_FILE = "spec.json"
_TENSOR_FILES = "tensors-*.safetensors"
_HEAD = ("format", "tensors", "sha256", "units", "left_out")
Tensors = dict[str, np.ndarray]


def save_spec(spec: Spec, path: str | Path) -> Path:
    """Write ``spec`` into the folder ``path``, made if absent; returns the path of its JSON file.

    Atomic: at any time the folder holds the old spec or the whole new one. Equal specs give equal bytes.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"`spec` must be a Spec, got {type(spec).__name__}: make_spec and load_spec return one")
    folder, tensors = given_path(path), {}
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"a spec is a folder, but {folder} is a file; give another path")
    units = [_unit_to_plain(unit, tensors) for unit in spec.units]
    data = safetensors.numpy.save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    name = _TENSOR_FILES.replace("*", sha256[:12])
    content = {"format": FORMAT, "tensors": name, "sha256": sha256, "units": units, "left_out": list(spec.left_out)}
    content["checksum"] = json_checksum(content)
    with replacing(folder / name) as temporary:
        temporary.write_bytes(data)
    with replacing(folder / SPEC_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for old in folder.glob(_TENSOR_FILES):  # of the spec that was replaced
        if old.name != name:
            old.unlink()
    return folder / SPEC_FILE


def load_spec(path: str | Path) -> Spec:
    """Read and validate the spec in the folder ``path`` (or the path of its JSON file).

    Raises:
        FileNotFoundError: no spec there.
        SpecError: another format version, unknown or missing keys, a truncated or changed file, values that cannot
            be right. The message begins with the file and says where in it.
    """
    path = given_path(path)
    file = path / SPEC_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no spec at {file}: write one with export_spec or tools/export.py")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file} is not valid JSON (truncated?): {error}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version not in (FORMAT, FORMER_FORMAT):
        raise SpecError(
            f"{file} has the format {version!r}, this version reads {FORMAT!r} and {FORMER_FORMAT!r}; export the model "
            "again"
        )
    try:
        _check_keys("spec", content, _HEAD, ("checksum",))
        if content.get("checksum", json_checksum(content)) != json_checksum(content):
            raise SpecError("it does not match its checksum: it is damaged, or was changed; export the model again")
        tensors = _read_tensors(file.parent, content["tensors"], content["sha256"])
        units = tuple(_unit(plain, tensors) for plain in _expect("units", content["units"], list))
        left_out = tuple(_expect("left_out", line, str) for line in _expect("left_out", content["left_out"], list))
        if tensors:
            raise SpecError(f"the tensor file has tensors that nothing uses: {', '.join(sorted(tensors)[:4])}")
        return Spec(units, left_out)
    except SpecError as error:
        raise SpecError(f"{file}: {error}") from None


def _read_tensors(folder: Path, name: Any, sha256: Any) -> Tensors:
    file = folder / Path(_expect("tensors", name, str)).name
    if not file.is_file():
        raise SpecError(f"its tensor file {file.name} is missing; export the model again")
    data = file.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise SpecError(
            f"its tensor file {file.name} is truncated or was changed: SHA-256 {actual[:12]}…, expected {sha256!r:.14}…"
        )
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise SpecError(f"its tensor file {file.name} cannot be read: {error}") from error


def _unit_to_plain(unit: UnitSpec, tensors: Tensors) -> dict[str, Any]:
    matmuls = [_to_plain(matmul, f"{unit.name}/{matmul.name}", tensors) for matmul in unit.matmuls]
    return {"name": unit.name, "matmuls": matmuls, "steps": [_to_plain(step, "", tensors) for step in unit.steps]}


def _to_plain(item: Any, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """Numbers and names of a dataclass; its arrays go to ``tensors``."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if isinstance(value, np.ndarray):
            packed = isinstance(item, WeightOperand) and field.name == "codes"
            tensors[f"{prefix}/{field.name}"] = pack(value, item.bits) if packed else np.ascontiguousarray(value)
            if packed:
                plain["shape"] = list(value.shape)
        elif type(value) in OPERANDS.values():
            part = _to_plain(value, f"{prefix}/{field.name}", tensors)
            plain[field.name] = {"family": value.family, **part}
        elif dataclasses.is_dataclass(value):
            plain[field.name] = _to_plain(value, "", tensors)
        elif isinstance(value, np.float32):
            plain[field.name] = float(value)
        elif isinstance(value, tuple):
            plain[field.name] = list(value)
        else:
            plain[field.name] = value
    return plain


def _unit(plain: Any, tensors: Tensors) -> UnitSpec:
    _check_keys("unit", plain, ("name", "matmuls", "steps"))
    name = _expect("name of a unit", plain["name"], str)
    matmuls = []
    for item in _expect("matmuls", plain["matmuls"], list):
        own = item.get("name") if isinstance(item, Mapping) else None
        try:
            matmuls.append(_from_plain(Matmul, item, f"{name}/{own}", tensors))
        except SpecError as error:
            raise SpecError(f"unit '{name}', matmul {own!r}: {error}") from None
    steps = [_from_plain(Step, step, "", tensors) for step in _expect("steps", plain["steps"], list)]
    return UnitSpec(name, tuple(matmuls), tuple(steps))


def _from_plain(kind: type, plain: Any, prefix: str, tensors: Tensors) -> Any:
    fields = _field_types(kind)
    arrays = {name for name, allowed in fields.items() if np.ndarray in allowed}
    shape = {"shape"} if kind is WeightOperand else set()
    optional = {name for name in arrays if type(None) in fields[name]}
    _check_keys(kind.__name__, plain, (set(fields) - arrays) | shape, optional)
    values: dict[str, Any] = {}
    for name, allowed in fields.items():
        if name in arrays and name not in plain:
            values[name] = _take(tensors, f"{prefix}/{name}")
        else:
            values[name] = _value(f"{kind.__name__}.{name}", plain[name], allowed, f"{prefix}/{name}", tensors)
    if shape:
        size = plain["shape"]
        if not isinstance(size, list) or len(size) != 2 or any(type(s) is not int or s < 1 for s in size):
            raise SpecError(f"`shape` of a weight must be [n, k], got {size!r}")
        values["codes"] = unpack(values["codes"], values["bits"], tuple(size))
    return kind(**values)


def _value(name: str, value: Any, allowed: tuple[type, ...], prefix: str, tensors: Tensors) -> Any:
    if value is None and type(None) in allowed:
        return None
    operands = [kind for kind in allowed if kind in OPERANDS.values()]
    if operands:
        family = value.get("family") if isinstance(value, Mapping) else None
        if family not in OPERANDS:
            raise SpecError(f"`{name}`: unknown family {family!r}; allowed: {', '.join(OPERANDS)}")
        rest = {key: item for key, item in value.items() if key != "family"}
        return _from_plain(OPERANDS[family], rest, prefix, tensors)
    if Patches in allowed:
        # files of the former format have no groups
        return _from_plain(Patches, {"groups": 1, **value} if isinstance(value, Mapping) else value, "", tensors)
    if np.float32 in allowed:
        if type(value) not in (int, float) or float(np.float32(value)) != value:
            raise SpecError(f"`{name}` must be a float32 number, got {value!r}")
        return np.float32(value)
    if tuple in allowed:
        return tuple(_expect(name, value, list))
    return _expect(name, value, *(kind for kind in allowed if kind in (int, str)))


@cache
def _field_types(kind: type) -> dict[str, tuple[type, ...]]:
    """Field -> the classes that its value may have (``tuple`` for any tuple)."""
    kinds = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = tuple(typing.get_origin(part) or part for part in parts)
    return {field.name: kinds[field.name] for field in dataclasses.fields(kind)}


def _take(tensors: Tensors, name: str) -> np.ndarray:
    if name not in tensors:
        raise SpecError(f"the tensor {name!r} is missing from the tensor file")
    return tensors.pop(name)


def _expect(name: str, value: Any, *kinds: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise SpecError(f"`{name}` must be of type {wanted}, got {value!r:.60}")
    return value


def _check_keys(what: str, plain: Any, keys: Any, optional: Any = ()) -> None:
    if not isinstance(plain, Mapping):
        raise SpecError(f"a {what} must be an object, got {plain!r:.60}")
    unknown = sorted(set(plain) - set(keys) - set(optional))
    missing = sorted(set(keys) - set(plain))
    if unknown or missing:
        raise SpecError(f"{what}: unknown keys {unknown}, missing keys {missing}; allowed: {', '.join(sorted(keys))}")
