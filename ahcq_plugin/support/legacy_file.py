# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save`` in its format before 1.6, in which OpenMMLab still publishes.

They have no checksum, and torch's reader of them can be made to run code. This one rests on the same machine as
``safe_load``, which calls it where such files are expected. Compare the file's published digest first.

A file is five pickles (a number that marks the format, its version, the writer's sizes of integers, the object, the
keys of its storages), then for each key the number of elements, 8 bytes little-endian, and their bytes.
"""

from __future__ import annotations

import os
from io import BufferedReader
from typing import Any

import torch

from ahcq_plugin.support.pickled_values import Refused
from ahcq_plugin.support.unpickle import unpickle

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def is_legacy(file: BufferedReader) -> bool:
    """Whether a file begins as a pickle does."""
    file.seek(0)
    return file.read(1) == b"\x80"


def read_legacy(file: BufferedReader) -> Any:
    """Tensors, on the CPU, and plain values of a file of the old format.

    Raises:
        Refused, ValueError: another format, a name that a checkpoint has no use for, damage.
    """
    left = file.seek(0, os.SEEK_END)
    file.seek(0)
    storages: dict[str, tuple[int, torch.Tensor]] = {}

    def claim(key: str, dtype: torch.dtype, elements: int) -> torch.UntypedStorage:
        """Memory for a storage, which the file has to be large enough to fill; filled below."""
        nonlocal left
        left -= max(0, elements) * dtype.itemsize
        if elements < 0 or left < 0:
            raise Refused(f"storage {key!r:.80} is said to have {elements} elements, more than the file holds")
        storages[key] = elements, torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
        return storages[key][1].untyped_storage()

    magic, version, system = (unpickle(file, _no_storage) for _ in range(3))
    if (magic, version) != (_MAGIC, _VERSION) or type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("it is not of torch.save before 1.6, or of a big-endian machine")
    content, keys = unpickle(file, claim), unpickle(file, _no_storage)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise Refused("its list of storages is not that of its tensors")
    for key in keys:
        elements, buffer = storages[key]
        if int.from_bytes(file.read(8), "little") != elements:
            raise Refused(f"storage {key!r:.80} has another number of elements than its tensors state")
        if file.readinto(buffer.numpy().data) != len(buffer):
            raise ValueError(f"it ends within storage {key!r:.80}")
    if file.read(1):
        raise ValueError("it goes on after its last storage")
    return content


def _no_storage(*_: Any) -> torch.UntypedStorage:
    raise Refused("it has a storage where none can be")
