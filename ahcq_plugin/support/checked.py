# SPDX-License-Identifier: Apache-2.0
"""Torch files with a digest of their own: one flipped bit anywhere in them is found when they are read.

The digest is the comment at the end of the zip archive: ``sha256:`` and 64 hexadecimal digits, over all bytes before
it. ``torch.load`` and unzip read such files as before. It guards against damage, not against somebody who computes it
anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ahcq_plugin.support.files import replacing

_MARK = b"sha256:"
DIGEST_BYTES = len(_MARK) + 64  # of the comment
_END = struct.Struct("<4s4H2LH")  # a zip archive's last record; its last field is the length of the comment
_CHUNK = 1 << 20
_DEEPEST = 50


def save_checked(obj: Any, path: str | Path) -> None:
    """``torch.save`` with a digest; ``path`` is the old file or the whole new one.

    Raises: OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            torch.save(obj, temporary)
        except RuntimeError as error:  # torch's writer does not say why
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.EIO, "cannot be written: is the disk full, or a limit reached?", str(path)) from error
        seal(temporary)


def check_plain(value: Any, name: str, tensors: bool = True, depth: int = 0) -> None:
    """Only what is read back without running code: mappings, sequences, texts, numbers, None, tensors.

    Args:
        tensors: whether the file that is to hold it can hold tensors.

    Raises: TypeError: something else, with its place.
    """
    if depth > _DEEPEST:
        raise TypeError(f"{name:.60}… is nested more than {_DEEPEST} deep, or holds itself")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check_plain(key, f"a key of {name}")
            check_plain(entry, f"{name}[{key!r}]", tensors, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            check_plain(entry, f"{name}[{index}]", tensors, depth + 1)
    elif isinstance(value, torch.Tensor) and value.is_meta:
        raise TypeError(f"{name} is a tensor without values, on the device meta")
    elif value is not None and type(value) not in (str, bool, int, float, *([torch.Tensor] if tensors else [])):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which no file of ours can hold: give numbers, texts, lists and dicts"
        )


def seal(path: str | Path) -> None:
    """Append the digest to a zip archive, in place.

    Raises:
        ValueError: no zip archive, or one that has a comment already.
    """
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        record = file.read()
        if len(record) != _END.size or record[:4] != b"PK\5\6":
            raise ValueError(f"{path} does not end as a zip archive without a comment does")
        file.seek(size - 2)
        file.write(DIGEST_BYTES.to_bytes(2, "little"))
        file.write(_comment(file, size))


def check_seal(file: BinaryIO) -> bool:
    """Whether a zip archive has a digest.

    Raises:
        ValueError: it has one, and its bytes are not those that were written.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - DIGEST_BYTES))
    found = file.read()
    if not found.startswith(_MARK):
        return False
    if found != _comment(file, size - DIGEST_BYTES):
        raise ValueError("its bytes do not match its SHA-256")
    return True


def _comment(file: BinaryIO, size: int) -> bytes:
    """What belongs behind the first ``size`` bytes."""
    state, left = hashlib.sha256(), size
    file.seek(0)
    while left and (chunk := file.read(min(left, _CHUNK))):
        state.update(chunk)
        left -= len(chunk)
    return _MARK + state.hexdigest().encode()
