# SPDX-License-Identifier: Apache-2.0
"""The engine as RTL: its C++ through ``hls.rtl``, behind AXI4 ports, in Verilator beside a simulated memory."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.cycles import CLOCK_HZ
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, Rtl, RtlError, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.simulate import Stalls, verilated
from ahcq_plugin.support.files import write_text

#: Large enough for every family and small enough to be made in minutes: one cell, short buffers.
SMALLEST = EngineConfig(cells=1, digit=4, left_depth=64, right_depth=64)
READS = ("program", "left", "right", "parameter")
TOP = "ahcq_engine"
LIMIT = 10_000_000
PORTS = ("ahcq_axi_read.sv", "ahcq_axi_write.sv")
_ENDS = (
    "",
    "no end within the limit of cycles",
    "an address beyond the memory",
    "a burst across 4 KiB, or a wrong count at the end",
    "an error response",
)


@dataclass(frozen=True)
class Memory:
    """The simulated memory behind the AXI4 ports.

    Attributes:
        latency: cycles from a read's address to its first beat.
        bytes_per_second: of all ports together at 300 MHz, in granules of 64 bytes; 0: one beat a cycle at every port.
    """

    latency: int = 1
    bytes_per_second: float = 0


@dataclass(frozen=True)
class RtlRun:
    """What a program took.

    Attributes:
        cycles: from the launch to the word that says that all results are in memory.
        ddr_bytes: moved, in whole granules of 64 bytes.
        beats: port -> beats of 32 bytes.
    """

    cycles: int
    ddr_bytes: int
    beats: dict[str, int]


@cache
def engine_rtl(config: EngineConfig = SMALLEST) -> Rtl:
    """The processes of an engine, every one scheduled at II = 1, and the module ``run`` that joins them.

    Raises:
        RtlError: a process cannot be scheduled. ToolError: a package of the extra ``rtl`` is missing.
    """
    with tempfile.TemporaryDirectory(prefix="ahcq_engine_") as name:
        path = Path(name) / "engine.cpp"
        write_text(render("engine_rtl.cpp.j2", dict(config=config.cpp)), path)
        return compile_rtl(Program(path, (sources("include"),)), "run", cache=cache_folder())


def engine_files(config: EngineConfig = SMALLEST) -> dict[str, str]:
    """Name -> SystemVerilog of the module ``ahcq_engine``: the engine behind AXI4 ports."""
    rtl = engine_rtl(config)
    values = dict(top=TOP, design=rtl.design.top, reads=READS, writes=_write_ports(rtl))
    cells = {name: sources("rtl", name).read_text(encoding="utf-8") for name in PORTS}
    return {**rtl.files, **cells, f"{TOP}.sv": render("engine_axi.sv.j2", values)}


def _write_ports(rtl: Rtl) -> list[dict[str, str]]:
    """Of each cell: the AXI4 port, and the streams of ``run`` that belong to it."""
    names = [port.name for port in rtl.design.ports]
    requests = [name for name in names if name.startswith("results_out")]
    answers = [name for name in names if name.startswith("written")]
    pairs = zip(requests, answers, strict=True)
    return [dict(axi=f"results_{i}", requests=ask, answers=answer) for i, (ask, answer) in enumerate(pairs)]


@cache
def simulation(config: EngineConfig = SMALLEST) -> Path:
    """The program that ``run`` starts; made where the cache of ``hls.rtl`` has none of this content.

    Raises:
        RtlError: a process cannot be scheduled. ToolError: a package of the extra ``rtl`` is missing or fails.
    """
    writes = [port["axi"] for port in _write_ports(engine_rtl(config))]
    bench = render("engine_bench.cpp.j2", dict(top=TOP, reads=list(READS), writes=writes))
    return verilated(engine_files(config), TOP, bench, cache_folder())


def run(
    image: Image,
    descriptors: Sequence[Descriptor],
    config: EngineConfig = SMALLEST,
    stalls: Stalls | None = None,
    memory: Memory | None = None,
    limit: int = LIMIT,
) -> RtlRun:
    """Put the descriptors into ``image`` and let the RTL execute them there, as ``simulate.run`` does in C++.

    Args:
        stalls: ``idle`` of what the memory answers, ``back`` of what it takes; after a reset the memory is as it was.
            None: none.
        memory: None: an answer after a cycle, a beat a cycle at every port.
        limit: of cycles.
    Raises:
        RtlError: the program did not come to its end, or a port broke a rule of AXI4.
        ToolError: see ``simulation``.
    """
    stalls, memory = stalls or Stalls(), memory or Memory()
    program = image.place(np.frombuffer(b"".join(d.encode() for d in descriptors), np.uint32))
    with tempfile.TemporaryDirectory(prefix="ahcq_engine_") as name:
        words, report = Path(name) / "memory", Path(name) / "report"
        image.words.tofile(words)
        numbers = [program, len(descriptors), limit, stalls.seed, round(256 * stalls.idle), round(256 * stalls.back)]
        numbers += [stalls.reset_at, memory.latency, memory.bytes_per_second / CLOCK_HZ]
        subprocess.run([simulation(config), words, report, *map(str, numbers)], check=True)
        found = np.fromfile(report, np.uint64).tolist()
        image.words[:] = np.fromfile(words, np.uint32)
    end, cycles, moved, *beats = found
    if end:
        raise RtlError(f"the engine did not end {len(descriptors)} commands: {_ENDS[end]}, after {cycles} cycles")
    ports = [*READS, *(f"results_{cell}" for cell in range(config.cells))]
    return RtlRun(cycles, moved, dict(zip(ports, beats, strict=True)))
