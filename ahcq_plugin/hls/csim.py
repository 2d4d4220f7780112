# SPDX-License-Identifier: Apache-2.0
"""C simulation without Vitis: layers compiled by g++ with the ap_types headers of hls4ml, called from Python."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ahcq_plugin.export import Matmul
from ahcq_plugin.export.golden import GoldenResult
from ahcq_plugin.export.matmul import lane_names
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import ap_types, sources

# No contraction: every float operation of the kernels rounds by itself, also where the machine could fuse two.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-label")
# Without it, layers of one name in two libraries of a process would share their tables.
SHARED = ("-fPIC", "-fno-gnu-unique")
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")  # inside ap_types


class BuildError(RuntimeError):
    """The compiler failed; the message has what it said."""


def include_flags(kernels: Path, folder: Path) -> list[str]:
    """Flags that find the kernels in ``kernels``, the stand-in for the stream header and the ap_types headers.

    The kernels by their way from ``folder``, where the compiler runs: its cache then knows them in any place.
    """
    return [
        f"-I{os.path.relpath(kernels, folder)}",
        "-isystem",
        str(sources("csim", "include")),
        "-isystem",
        str(ap_types()),
    ]


def tool(name: str) -> str | None:
    """The path of a program on PATH or beside the running Python (an environment need not be activated)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def compiler() -> list[str]:
    """The C++ compiler, behind ccache where there is one; BuildError if g++ is missing."""
    found = tool("g++")
    if found is None:
        raise BuildError("g++ is not on PATH: install a C++17 compiler (Debian: `apt-get install g++`)")
    cache = tool("ccache")
    return [cache, found] if cache else [found]


def compile_cpp(arguments: Sequence[str], folder: Path) -> None:
    """Run the compiler in ``folder``; BuildError with what it said from the first error on if it fails."""
    run = subprocess.run([*compiler(), *arguments], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr[max(0, run.stderr.find("error:") - 200) :][:4000]
        raise BuildError(f"g++ failed ({run.returncode}) on {' '.join(arguments)}:\n{said}")


@dataclass(frozen=True, eq=False)
class CompiledLayer:
    """A generated layer as a Python function.

    Attributes:
        matmul: what it was generated from.
        top: name of its top function.
        scales: float32, the memory of scales.
    """

    matmul: Matmul
    top: str
    scales: np.ndarray
    _library: ctypes.CDLL

    def run(self, left: np.ndarray, right: np.ndarray | None = None, accumulators: bool = True) -> GoldenResult:
        """The C++ counterpart of ``golden.run`` for codes (batch, rows, k) and (batch, n, k) or (batch, k, n).

        Raises:
            RuntimeError: the layer read or wrote another number of beats than it should.
        """
        matmul, lanes = self.matmul, lane_names(self.matmul.left)
        batch, rows, _ = left.shape
        left = np.ascontiguousarray(left, np.uint8)
        right = np.ascontiguousarray(right if right is not None else np.zeros(1), np.uint8)
        output = np.zeros((batch, rows, matmul.n), np.float32)
        sums = np.zeros((*output.shape, len(lanes)), np.int64)
        function = getattr(self._library, f"{self.top}_run")
        pointers = [_pointer(left), _pointer(right), batch, rows, _pointer(self.scales), _pointer(output)]
        if not function(*pointers, _pointer(sums) if accumulators else None):
            raise RuntimeError(f"{self.top}: its streams did not hold exactly what they should")
        return GoldenResult(sums, output, lanes)

    def quantize(self, name: str, values: np.ndarray) -> np.ndarray:
        """Codes of float32 (rows, length) by the generated quantizer ``name``."""
        values = np.ascontiguousarray(values, np.float32)
        codes = np.zeros(values.shape, np.uint8)
        if not getattr(self._library, f"{self.top}_{name}_run")(_pointer(values), len(values), _pointer(codes)):
            raise RuntimeError(f"{self.top}_{name}: its streams did not hold exactly what they should")
        return codes.astype(np.int64)


def compile_layers(
    folder: Path,
    layers: Sequence[tuple[str, str, Matmul, np.ndarray, Sequence[str]]],
    kernels: Path,
    name: str = "csim",
) -> dict[str, CompiledLayer]:
    """Compile generated layers into one library.

    Args:
        folder: where their folders are; the library goes there too.
        layers: (folder of the layer, top, matmul, scales, names of quantizers) of each.
        kernels: the include folder of the kernels.
        name: of the library.
    Raises:
        BuildError: g++ is missing or fails.
    """
    plain = [dict(folder=part, top=top, quantizers=list(names)) for part, top, _, _, names in layers]
    (folder / f"{name}.cpp").write_text(render("csim_api.cpp.j2", dict(layers=plain)), encoding="utf-8")
    compile_cpp(
        [*FLAGS, *QUIET, *include_flags(kernels, folder), *SHARED, "-c", f"{name}.cpp", "-o", f"{name}.o"], folder
    )
    compile_cpp(["-shared", f"{name}.o", "-o", f"{name}.so"], folder)
    # A process keeps a library by its path: new contents need a new one.
    path = folder / f"{name}-{hashlib.sha256((folder / f'{name}.so').read_bytes()).hexdigest()[:16]}.so"
    os.replace(folder / f"{name}.so", path)
    library = ctypes.CDLL(str(path))
    return {top: CompiledLayer(matmul, top, scales, library) for _, top, matmul, scales, _ in layers}


def _pointer(values: np.ndarray) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)
