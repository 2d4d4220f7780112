# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to; it becomes ``path`` when the body ends, and is removed when the body raises.

    The folder is made when absent; an older file stays until the end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 ``text`` atomically; the folder is made when absent, an older file stays when this fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path, indent: int | None = 2) -> None:
    """JSON through :func:`write_text`; NaN and infinities are refused (they are not JSON)."""
    write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", path)


def fresh(path: str | Path) -> Path:
    """Where a file is made that is to replace ``path`` together with others, see :func:`replace_together`."""
    path = Path(path)
    return path.with_name(f".{path.name}.new")


def replace_together(paths: Iterable[str | Path]) -> None:
    """Move what was made at ``fresh(path)`` to every ``path``; all of them must be there before the first is moved.

    Raises:
        FileNotFoundError: one was not made; nothing is moved then.
    """
    pairs = [(fresh(path), Path(path)) for path in paths]
    for made, _ in pairs:
        if not made.is_file():
            raise FileNotFoundError(f"{made} was not made")
    for made, path in pairs:
        os.replace(made, path)
