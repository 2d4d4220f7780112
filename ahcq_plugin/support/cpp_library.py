# SPDX-License-Identifier: Apache-2.0
"""Libraries of C++ kernels: compiled on first use, for this processor, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from ahcq_plugin.support.kept_file import kept_file
from ahcq_plugin.support.user_cache import user_cache

logger = logging.getLogger(__name__)
#: No contraction, and no reordering but where a loop asks for it: every float operation rounds by itself.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC")
FLAGS += ("-shared", "-w")
_WIDE = "-mprefer-vector-width=512"
_TIMEOUT = 300


def compiler() -> str | None:
    """The C++ compiler: that which ``CXX`` names, else g++, clang++ or c++ on PATH."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@cache
def load(source: Path, *folders: Path) -> ctypes.CDLL:
    """The library of ``source``; compiled where the cache has none for this file, the headers beside it and those in
    ``folders``, this compiler and this processor.

    The cache is :func:`~ahcq_plugin.support.user_cache.user_cache`.

    Raises:
        RuntimeError: no compiler, or it fails.
    """
    path = compiler()
    if path is None:
        raise RuntimeError("no C++ compiler on PATH (Debian: `apt-get install g++`, or name one in CXX)")
    flags, target = _flags(path)
    state = hashlib.sha256(" ".join(flags).encode() + target)
    headers = (header for folder in (source.parent, *folders) for header in sorted(folder.glob("*.h")))
    for part in (source, *headers):
        state.update(part.name.encode() + part.read_bytes())

    def make(library: Path) -> None:
        logger.info("compiling %s with %s", source.name, path)
        _run([path, *flags, str(source), "-o", str(library)])

    return ctypes.CDLL(str(kept_file(user_cache() / f"{source.stem}_{state.hexdigest()[:24]}.so", make)))


def threads() -> ctypes.c_int32:
    """For a kernel to use: as many as PyTorch's operators do."""
    return ctypes.c_int32(torch.get_num_threads())


def _flags(path: str) -> tuple[list[str], bytes]:
    """Flags that the compiler takes here, and what they make it define: its version and the processor's abilities."""
    reason: RuntimeError | None = None
    for extra in (["-march=native", _WIDE, "-fopenmp"], ["-march=native"], ["-mcpu=native"], []):
        try:
            return [*FLAGS, *extra], _run([path, *extra, "-dM", "-E", "-x", "c++", os.devnull])
        except RuntimeError as error:
            reason = error
    raise reason or RuntimeError(f"{path} takes no flags")


def _run(command: list[str]) -> bytes:
    try:
        run = subprocess.run(command, capture_output=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from error
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed ({run.returncode}): {run.stderr.decode(errors='replace')[:2000]}")
    return run.stdout
