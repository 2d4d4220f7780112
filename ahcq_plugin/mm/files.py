# SPDX-License-Identifier: Apache-2.0
"""Text files that are either whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 ``text`` atomically; the folder is made when absent, an older file stays when this fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: str | Path, indent: int | None = 2) -> None:
    """JSON through :func:`write_text`; NaN and infinities are refused (they are not JSON)."""
    write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", path)
