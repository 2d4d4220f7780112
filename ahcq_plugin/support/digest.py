# SPDX-License-Identifier: Apache-2.0
"""A hash of values: the same in every process and every run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def digest(value: Any) -> str:
    """SHA-256 of nested mappings, sequences, numbers, strings, bytes, arrays and tensors, by value.

    Raises:
        TypeError: anything else; the hash of an object by its address would never match again.
    """
    state = hashlib.sha256()
    _update(state, value)
    return state.hexdigest()


def _update(state, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:  # NumPy has none
            _update(state, "bfloat16")
            value = value.view(torch.int16)
        _update(state, value.numpy())
    elif isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
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
