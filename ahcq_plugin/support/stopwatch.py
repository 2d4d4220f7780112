# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of the stages of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")  # Linux: the peak resident size starts again from the present one


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(row for row in _STATUS.read_text().splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        # macOS counts bytes, other systems kilobytes; without a reset this is the peak since the process started.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """``with stages("calibrate", device): ...`` records ``{"calibrate": {"seconds": ..., "peak_bytes": ...}}``.

    ``peak_bytes`` is the allocator's peak on CUDA, the resident size of the whole process on the CPU.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str, device: torch.device | str = "cpu") -> Iterator[None]:
        device = torch.device(device)
        _reset_peak(device)
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.records[name] = {"seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes(device)}
