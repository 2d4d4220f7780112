# SPDX-License-Identifier: Apache-2.0
"""A folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


class LockedError(ValueError):
    """Another process writes to the folder."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Within the context, no other ``locked`` on ``folder`` begins; the folder is made when absent.

    The system lets go of the lock when the process ends, however it ends, so a killed one leaves nothing that is in the
    way.

    Raises:
        LockedError: another process has it; the message says which.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _taken(path)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _taken(path: Path) -> int:
    """Descriptor of the file at ``path``, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise LockedError(
                f"{path.parent} is in use by {holder}: wait until it ends, or choose another folder"
            ) from error
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the one that had it has removed it meanwhile
