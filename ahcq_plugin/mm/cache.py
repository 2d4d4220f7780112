# SPDX-License-Identifier: Apache-2.0
"""Results kept for later runs in JSON files named after a hash of what determines them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ahcq_plugin.mm.files import write_json
from ahcq_plugin.ptq.workers import ALONE, Workers

logger = logging.getLogger(__name__)


class Cache:
    """A folder of results; without a folder everything is computed anew.

    With several ``workers`` the first looks into the folder and writes to it.
    """

    def __init__(self, folder: str | Path | None, workers: Workers = ALONE):
        self.folder, self.workers = None if folder is None else Path(folder), workers

    def fetch(self, name: str, key: Callable[[], str], compute: Callable[[], Any]) -> Any:
        """The JSON value kept under ``name`` and ``key()``, else ``compute()``, which is then kept.

        A file that cannot be read is replaced.
        """
        if self.folder is None:
            return compute()
        path, text = self.folder / f"{name}_{key()[:24]}.json", None
        if self.workers.is_first and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
        text = self.workers.first(text)
        if text is not None:
            try:
                value = json.loads(text)
                logger.info("%s taken from %s", name, path)
                return value
            except ValueError as error:
                logger.warning("%s is not readable (%s), computed again", path, error)
        value = compute()
        if self.workers.is_first:
            write_json(value, path, indent=None)
        return value


def digest(value: Any) -> str:
    """SHA-256 of nested mappings, sequences, numbers, strings, bytes, arrays and tensors, by value.

    Raises:
        TypeError: anything else; the hash of an object by its address would never match again.
    """
    state = hashlib.sha256()
    _update(state, value)
    return state.hexdigest()


def _update(state, value: Any) -> None:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = (
            value.detach().cpu().contiguous().numpy()
            if isinstance(value, torch.Tensor)
            else np.ascontiguousarray(value)
        )
        state.update(f"array {array.dtype} {array.shape} ".encode())
        state.update(array.data if array.size else b"")
    elif isinstance(value, bytes):
        state.update(f"bytes {len(value)} ".encode())
        state.update(value)
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=str):
            _update(state, str(key))
            _update(state, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        state.update(f"sequence {len(value)} ".encode())
        for item in value:
            _update(state, item)
    elif value is None or isinstance(value, (str, int, float, np.generic)):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        state.update(f"{len(text)} {text} ".encode())
    else:
        raise TypeError(f"cannot hash a {type(value).__name__} by value")
