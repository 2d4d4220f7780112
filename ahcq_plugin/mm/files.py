# SPDX-License-Identifier: Apache-2.0
"""Text files that are either whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ahcq_plugin.ptq.atomic import replacing


def write_text(text: str, path: str | Path) -> None:
    """Write UTF-8 ``text`` atomically; the folder is made when absent, an older file stays when this fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path, indent: int | None = 2) -> None:
    """JSON through :func:`write_text`; NaN and infinities are refused (they are not JSON)."""
    write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", path)
