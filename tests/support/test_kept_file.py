# SPDX-License-Identifier: Apache-2.0
"""A file that is kept for later runs is used while it is what was made, else made again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ahcq_plugin.support.kept_file import kept_file
from tests.robustness.kinds import flip

_DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, random.Random(1)),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "no record": lambda path: path.with_name("lib.so.sha256").unlink(),
    "another record": lambda path: path.with_name("lib.so.sha256").write_text("0" * 64 + "  lib.so\n"),
    "a record that is no text": lambda path: path.with_name("lib.so.sha256").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", [None, *_DAMAGE])
def test_made_again_only_where_it_is_damaged(kind: str | None, tmp_path: Path) -> None:
    path, calls = tmp_path / "lib.so", []

    def make(place: Path) -> None:
        calls.append(place)
        place.write_bytes(bytes(range(200)))

    assert kept_file(path, make) == path and len(calls) == 1
    if kind is not None:
        _DAMAGE[kind](path)
    assert kept_file(path, make) == path and len(calls) == 1 + (kind is not None)
    assert path.read_bytes() == bytes(range(200)) and kept_file(path, make) == path
    assert len(calls) == 1 + (kind is not None)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def make(place: Path) -> None:
        place.write_bytes(b"half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        kept_file(tmp_path / "lib.so", make)
    assert not list(tmp_path.iterdir())
