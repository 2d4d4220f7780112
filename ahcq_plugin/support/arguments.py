# SPDX-License-Identifier: Apache-2.0
"""Types of command-line arguments: what cannot be right is refused by argparse, in one line, before any work."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ahcq_plugin.support.files import check_name, given_path

_MOST = 10**9


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"give a whole number from {least:,} to {most:,}, got {text!r}")
        return value

    return parse


at_least_one, at_least_zero, bit_width = whole(1), whole(0), whole(2, 8)
# more of them than these ask for terabytes, or end the process
box_count, thread_count, worker_count = whole(1, 100_000), whole(1, 1024), whole(0, 1024)


def matrix_shape(text: str) -> tuple[int, int]:
    """The shape of a matrix as ``768x3072``, rows first."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"give rows and columns as 768x3072, got {text!r}")
    return int(match[1]), int(match[2])


def positive(text: str) -> float:
    """A finite number above 0, from 1e-12 to 1e12: sums and squares of it are finite too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-12 <= value <= 1e12:
        raise argparse.ArgumentTypeError(f"give a finite number above 0, from 1e-12 to 1e12, got {text!r}")
    return value


def usable_device(text: str) -> str:
    """The name of a CPU or of a GPU that this machine has."""
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def writable(text: str) -> Path:
    """A file or folder that can be written: what is there of its path is folders, the last of them ours."""
    try:
        return check_writable(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def writable_folder(text: str) -> Path:
    """As ``writable``; there is no file of that name."""
    path = writable(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text:.200} is a file, not a folder")
    return path


def writable_file(text: str) -> Path:
    """As ``writable``; there is no folder, device or pipe of that name."""
    path = writable(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text:.200} is no file that can be written")
    return path


def check_writable(text: str) -> Path:
    """The path of a file or folder that can be written, see ``writable``; else ValueError."""
    try:
        path = given_path(text)
        check_name(path)
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise ValueError(f"{text:.200} cannot be written: {error.strerror}") from error
    if above != path and not above.is_dir():
        raise ValueError(f"{text:.200} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{text:.200} cannot be written: no permission for {above}")
    return path


def check_apart(out: str | Path, *inputs: str | Path | None) -> None:
    """ValueError where a file to write is one of those to read, which would be lost."""
    for given in inputs:
        if given is not None and os.path.exists(out) and os.path.exists(given) and os.path.samefile(out, given):
            raise ValueError(f"{out} is read, and would be written over: give another name")


def check_device(name: str | None) -> None:
    """The name of a CPU or of a GPU that this machine has; else ValueError."""
    if name is None:
        return
    try:
        device = torch.device(str(name))  # a number would be a GPU
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is none that runs were tried on: give cpu, cuda or cuda:N")
    if device.type == "cpu" and device.index:
        raise ValueError(f"device {name!r} is not there: all of a CPU is 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
