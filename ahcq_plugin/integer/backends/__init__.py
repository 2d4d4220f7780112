# SPDX-License-Identifier: Apache-2.0
"""What multiplies: the fastest backend that gives right results here, chosen once for each kind of device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

from ahcq_plugin.integer.backends.base import Backend
from ahcq_plugin.integer.backends.checks import problem_of
from ahcq_plugin.integer.backends.native import NativeBackend
from ahcq_plugin.integer.backends.reference import ReferenceBackend
from ahcq_plugin.integer.backends.torch_mm import TorchBackend

logger = logging.getLogger(__name__)
#: From the fastest to the one that every device has.
BACKENDS: dict[str, type[Backend]] = {
    "native": NativeBackend,
    "torch": TorchBackend,
    "reference": ReferenceBackend,
}
_forced = threading.local()


def backend_for(x: Tensor) -> Backend:
    """The backend for tensors on the device of ``x``."""
    name = getattr(_forced, "name", None)
    return _usable(name, x.device.type) if name else _fastest(x.device.type)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, in this thread, everything runs on the backend ``native``, ``torch`` or ``reference``.

    Raises:
        ValueError: unknown name.
        RuntimeError: at the first call, the backend does not work here.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")
    before = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


@cache
def _fastest(device: str) -> Backend:
    for name, kind in BACKENDS.items():
        if device in kind.devices:
            try:
                return _usable(name, device)
            except RuntimeError as reason:
                logger.warning("integer inference on %s goes on without the backend %s: %s", device, name, reason)
    return ReferenceBackend()


@cache
def _usable(name: str, device: str) -> Backend:
    backend: Any = BACKENDS[name]()
    problem = None if device in backend.devices else f"it does not run on {device}"
    problem = problem or problem_of(backend, device)
    if problem:
        raise RuntimeError(problem)
    return backend
