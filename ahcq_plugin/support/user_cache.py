# SPDX-License-Identifier: Apache-2.0
"""The user's folder for what is compiled on first use."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path


def user_cache() -> Path:
    """``ahcq_plugin`` in ``XDG_CACHE_HOME``, else in ``~/.cache``; where that cannot be written, or belongs to somebody
    else, a temporary folder of this process: what lies there is run."""
    return _folder(str(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))


@cache
def _folder(home: str) -> Path:
    folder = Path(home) / "ahcq_plugin"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="ahcq_plugin_"))
