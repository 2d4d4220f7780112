# SPDX-License-Identifier: Apache-2.0
"""Plain values as the types that their reader expects; what does not fit is named with its place."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.support.typed import typed


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[float, ...]
    count: int = 1
    note: str | None = None


@dataclass(frozen=True)
class Cloud:
    points: list[Point]
    extra: dict[str, list[float]]
    more: Any = None


_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_POINTS = st.builds(
    Point,
    name=st.text(),
    at=st.lists(_FINITE).map(tuple),
    count=st.integers(),
    note=st.none() | st.text(),
)
_CLOUDS = st.builds(
    Cloud, points=st.lists(_POINTS), extra=st.dictionaries(st.text(), st.lists(_FINITE)), more=st.none() | st.booleans()
)


@given(_CLOUDS)
def test_what_was_written_comes_back(cloud: Cloud) -> None:
    assert typed(json.loads(json.dumps(asdict(cloud))), Cloud, "it") == cloud


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (5, Cloud, "it must be an object, got 5"),
        ({"points": []}, Cloud, "it has unknown keys [], lacks ['extra']"),
        ({"points": [], "extra": {}, "x": 1}, Cloud, "it has unknown keys ['x'], lacks []"),
        ({"points": {}, "extra": {}}, Cloud, "it.points must be a list, got {}"),
        ({"points": [{"name": 5, "at": []}], "extra": {}}, Cloud, "it.points[0].name must be a text, got 5"),
        ({"points": [], "extra": {"a": [1, math.nan]}}, Cloud, "it.extra['a'][1] must be a finite number, got nan"),
        ({"name": "x", "at": [1], "count": True}, Point, "it.count must be a whole number, got True"),
        ({"name": "x", "at": [1], "count": 1.0}, Point, "it.count must be a whole number, got 1.0"),
        ({"name": "x", "at": ["1"]}, Point, "it.at[0] must be a finite number, got '1'"),
        ({"name": "x", "at": [True]}, Point, "it.at[0] must be a finite number, got True"),
        ({"name": "x", "at": [1], "note": 5}, Point, "it.note must be a text, got 5"),
        ({5: []}, dict[str, list[float]], "it must be an object, got {5: []}"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        typed(value, kind, "it")
    assert str(caught.value) == message
