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

from ahcq_plugin.export import SpecError
from ahcq_plugin.export.golden import GoldenResult, checked_codes
from ahcq_plugin.export.matmul import lane_names
from ahcq_plugin.hls.layer import Layer
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
    path = tool("g++")
    if path is None:
        raise BuildError("g++ is not on PATH: install a C++17 compiler (Debian: `apt-get install g++`)")
    cache = tool("ccache")
    return [cache, path] if cache else [path]


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
        layer: what it was generated from.
    """

    layer: Layer
    _library: ctypes.CDLL

    def run(self, left: np.ndarray, right: np.ndarray | None = None, accumulators: bool = True) -> GoldenResult:
        """The C++ counterpart of ``golden.run`` for codes (batch, rows, k) and (batch, n, k) or (batch, k, n).

        Raises:
            SpecError: a shape or dtype that does not fit, or a code outside [0, 2^bits - 1].
            RuntimeError: the layer read or wrote another number of beats than it should.
        """
        layer, lanes = self.layer, lane_names(self.layer.matmul.left)
        left, right = checked_codes(layer.matmul, left, right)
        if left.ndim != 3:
            raise self._wrong_shape("left codes", left, f"(batch, rows, {layer.matmul.k})")
        batch, rows, _ = left.shape
        if right is not None:
            wanted = (batch, layer.inputs[1].rows, layer.inputs[1].length)
            if right.shape != wanted:
                raise self._wrong_shape("right codes", right, str(wanted))
        left = np.ascontiguousarray(left, np.uint8)
        right = np.ascontiguousarray(right if right is not None else np.zeros(1), np.uint8)
        output = np.zeros((batch, rows, layer.matmul.n), np.float32)
        sums = np.zeros((*output.shape, len(lanes)), np.int64)
        function = getattr(self._library, f"{layer.top}_run")
        pointers = [_pointer(left), _pointer(right), batch, rows, _pointer(layer.layout.scales), _pointer(output)]
        if not function(*pointers, _pointer(sums) if accumulators else None):
            raise RuntimeError(f"{layer.top}: its streams did not hold exactly what they should")
        return GoldenResult(sums, output, lanes)

    def quantize(self, name: str, values: np.ndarray) -> np.ndarray:
        """int64 codes of float32 (rows, length) by the generated quantizer ``name``; of (batch, rows, length) where the
        operand is per head, products head after head.

        Raises:
            SpecError: another shape.
            RuntimeError: the quantizer read or wrote another number of beats than it should.
        """
        values = np.ascontiguousarray(values, np.float32)
        given = {given.quantizer: given for given in self.layer.inputs}[name]
        if values.ndim != 2 + given.is_per_head or values.shape[-1] != given.length:
            axes = "batch, rows" if given.is_per_head else "rows"
            raise self._wrong_shape(f"values for the {name}", values, f"({axes}, {given.length})")
        batch, rows = values.shape[:2] if given.is_per_head else (1, len(values))
        codes = np.zeros(values.shape, np.uint8)
        top = f"{self.layer.top}_{name}"
        if not getattr(self._library, f"{top}_run")(_pointer(values), batch, rows, _pointer(codes)):
            raise RuntimeError(f"{top}: its streams did not hold exactly what they should")
        return codes.astype(np.int64)

    def _wrong_shape(self, what: str, got: np.ndarray, wanted: str) -> SpecError:
        return SpecError(f"matmul '{self.layer.matmul.name}': {what} of shape {got.shape}, expected {wanted}")


def compile_generated(layers: Sequence[Layer], folder: Path) -> dict[str, CompiledLayer]:
    """The layers that ``generate`` wrote to ``folder``, compiled together and callable from Python, by top name.

    The library stays in ``folder``.

    Raises:
        BuildError: g++ is missing or fails.
    """
    folder = Path(folder).resolve()
    parts = [dict(top=layer.top, quantizers=[given.quantizer for given in layer.inputs]) for layer in layers]
    (folder / "csim.cpp").write_text(render("csim_api.cpp.j2", dict(layers=parts)), encoding="utf-8")
    flags = [*FLAGS, *QUIET, *include_flags(folder / "include", folder), *SHARED]
    compile_cpp([*flags, "-c", "csim.cpp", "-o", "csim.o"], folder)
    compile_cpp(["-shared", "csim.o", "-o", "csim.so"], folder)
    # A process keeps a library by its path: new contents need a new one.
    path = folder / f"csim-{hashlib.sha256((folder / 'csim.so').read_bytes()).hexdigest()[:16]}.so"
    os.replace(folder / "csim.so", path)
    library = ctypes.CDLL(str(path))
    return {layer.top: CompiledLayer(layer, library) for layer in layers}


def _pointer(values: np.ndarray) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)
