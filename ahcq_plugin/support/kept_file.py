# SPDX-License-Identifier: Apache-2.0
"""Files that are made once for later runs, as compiled libraries are: used while they are what was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ahcq_plugin.support.files import replacing, sha256_of, write_text


def kept_file(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``; where it is not there, or its SHA-256 is not the one in ``<path>.sha256``, it is made again.

    Args:
        make: writes the file at the path that it is given.
    """
    record = path.with_name(f"{path.name}.sha256")
    if path.is_file() and record.is_file():
        noted = record.read_text(encoding="utf-8", errors="replace").split(" ")[0]
        if noted == sha256_of(path):
            return path
    with replacing(path) as temporary:
        make(temporary)
        made = sha256_of(temporary)
    write_text(f"{made}  {path.name}\n", record)  # as sha256sum writes and checks it
    return path
