# SPDX-License-Identifier: Apache-2.0
"""The strict device in Python: ``torch.device("strict")`` behaves like an accelerator and computes on the host."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace

import torch

import ahcq_plugin
from ahcq_plugin.support.cpp_library import compiler
from ahcq_plugin.support.files import replacing
from ahcq_plugin.support.user_cache import user_cache

NAME = "strict"
SOURCE = Path(__file__).with_name("strict.cpp")
PACKAGE = Path(ahcq_plugin.__file__).parent
_TIMEOUT = 600
#: Modules that run every operator of others.
_WRAPPERS = ("macs.py",)


@dataclass
class Events:
    """What happened between host and device.

    Attributes:
        places: of each event, (event, place): ``wait``, the host waits for the device; ``to device``, ``to host``,
            a copy. The place is the innermost line of the package, or ``-``.
        operators: (event, operator).
    """

    places: Counter[tuple[str, str]] = field(default_factory=Counter)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __getitem__(self, event: str) -> int:
        return sum(count for (name, _), count in self.operators.items() if name == event)


@cache
def load() -> ModuleType:
    """Register the device with PyTorch: once in a process, for good.

    Raises:
        RuntimeError: no compiler, or the extension does not compile with this PyTorch.
    """
    library = _compiled()
    spec = importlib.util.spec_from_file_location("strict_device", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(
        NAME,
        SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            _is_in_bad_fork=lambda: False,
            manual_seed_all=lambda seed: None,  # what is drawn without a generator is the CPU's
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
            get_amp_supported_dtype=lambda: [torch.bfloat16],
        ),
    )
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    return module


@contextmanager
def counting() -> Iterator[Events]:
    """Count what happens between host and device."""
    events, module = Events(), load()

    def listen(event: str, operator: str) -> None:
        events.places[event, _place(sys._getframe(1))] += 1
        events.operators[event, operator.removeprefix("aten::")] += 1

    module.listen(listen)
    try:
        yield events
    finally:
        module.listen(None)


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.name not in _WRAPPERS:
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "-"


def _compiled() -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    path = compiler()
    if path is None:
        raise RuntimeError("no C++ compiler on PATH")
    command = [path, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=strict_device"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", str(SOURCE)]
    command += [f"-I{folder}" for folder in [*include_paths(), sysconfig.get_paths()["include"]]]
    command += [f"-L{folder}" for folder in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    state = hashlib.sha256(" ".join(command).encode() + torch.__version__.encode() + SOURCE.read_bytes())
    library = user_cache() / f"strict_device_{state.hexdigest()[:24]}.so"
    if not library.is_file():
        with replacing(library) as made:
            run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=_TIMEOUT)
            if run.returncode:
                raise RuntimeError(f"the strict device does not compile:\n{run.stderr[:4000]}")
    return library
