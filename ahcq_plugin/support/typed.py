# SPDX-License-Identifier: Apache-2.0
"""What a file of plain values holds, by the types that its reader expects: said where it is read, with the place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}


def typed(value: Any, kind: Any, where: str) -> Any:
    """``value``, as JSON gives it, as ``kind``: a dataclass, int, float, str, bool, None, ``Any``, unions of them,
    ``list[kind]``, ``tuple[kind, ...]``, ``dict[str, kind]``.

    Args:
        where: name of the value, for the message.
    Raises:
        ValueError: it is of another type; a key is missing or unknown; one line that says where.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, parts, where)
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(value, typing.cast(type, kind), where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(value, "a list", where)
        return origin(typed(item, parts[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wrong(value, "an object", where)
        return {key: typed(item, parts[1], f"{where}[{key!r:.60}]") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if kind is float or type(value) is not kind:
        raise _wrong(value, _NAMES[kind], where)
    return value


def _any_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return typed(value, kind, where)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _of_dataclass(value: Any, kind: type, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        raise _wrong(value, "an object", where)
    unknown = sorted(str(key) for key in value if key not in fields)
    missing = [name for name in fields if name not in value and not _has_default(fields[name])]
    if unknown or missing:
        raise ValueError(f"{where} has unknown keys {unknown}, lacks {missing}")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: typed(item, kinds[name], f"{where}.{name}") for name, item in value.items()})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _wrong(value: Any, expected: str, where: str) -> ValueError:
    return ValueError(f"{where} must be {expected}, got {value!r:.60}")
