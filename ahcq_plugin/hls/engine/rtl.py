# SPDX-License-Identifier: Apache-2.0
"""The engine as RTL: its C++ through ``hls.rtl``, behind AXI4 ports, in Verilator beside a simulated memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import ahcq_plugin.hls.rtl as flow
from ahcq_plugin.hls.engine import multiply
from ahcq_plugin.hls.engine.config import AnyConfig, EngineConfig
from ahcq_plugin.hls.engine.cycles import CLOCK_HZ
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, RtlError, ToolError, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.simulate import Stalls, verilated
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.files import write_text

#: One cell and short buffers: made in minutes, and holds every matmul of a unit of the packaged SAM.
SMALLEST = EngineConfig(cells=1, digit=4, left_depth=64, right_depth=128)
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
        beats: port (``reads``, ``writes``) -> beats of 32 bytes.
    """

    cycles: int
    ddr_bytes: int
    beats: dict[str, int]


@dataclass(frozen=True)
class EngineRtl:
    """An engine in SystemVerilog.

    Attributes:
        files: name -> text; the module ``ahcq_engine`` has AXI4 ports.
        stages: process -> pipeline stages; every one takes a turn a cycle (II = 1), or there would be no RTL.
        instances: process -> how often it is there.
    """

    files: dict[str, str]
    stages: dict[str, int]
    instances: dict[str, int]


def reads(config: AnyConfig) -> list[str]:
    """Names of the AXI4 ports that read, in the order of the C++ enum ``read_port``."""
    return ["program", "left", "right", "parameter", *(["scores"] if config.softmax else [])]


def writes(config: AnyConfig) -> list[str]:
    """Names of those that write: of the cells, and of softmax."""
    return [*(f"results_{cell}" for cell in range(config.cells)), *(["codes"] if config.softmax else [])]


@cache
def engine_rtl(config: AnyConfig = SMALLEST) -> EngineRtl:
    """The RTL of an engine; made where the cache of ``hls.rtl`` has none of these sources.

    Raises:
        RtlError: a process cannot be scheduled at II = 1. ToolError: a package of the extra ``rtl`` is missing.
    """
    made = Cache(cache_folder()).fetch("engine", lambda: _content(config), lambda: asdict(_made(config)))
    return EngineRtl(**made)


def _made(config: AnyConfig) -> EngineRtl:
    with tempfile.TemporaryDirectory(prefix="ahcq_engine_") as name:
        source = Path(name) / "engine.cpp"
        codes = isinstance(config, EngineConfig)
        header, top = ("engine", "run") if codes else ("float_engine", "run_floats")
        write_text(render("engine_rtl.cpp.j2", dict(config=config.cpp, header=header, top=top)), source)
        modules = {multiply.NAME: partial(multiply.module_text, config)} if isinstance(config, EngineConfig) else {}
        rtl = compile_rtl(Program(source, (sources("include"),)), top, cache=cache_folder(), modules=modules)

    def ports(axi: Sequence[str], **streams: str) -> list[dict[str, str]]:
        """Names of the AXI4 ports, and of the elements of the streams behind them."""
        found = [[port.name for port in rtl.design.ports if port.name.startswith(name)] for name in streams.values()]
        return [dict(zip(["axi", *streams], names, strict=True)) for names in zip(axi, *found, strict=True)]

    read = ports(reads(config), requests="requests", beats="beats")
    written = ports(writes(config), requests="results_out", answers="written")
    text = render("engine_axi.sv.j2", dict(top=TOP, design=rtl.design.top, reads=read, writes=written))
    shell = {name: sources("rtl", name).read_text(encoding="utf-8") for name in PORTS}
    instances = Counter(one.process.name for one in rtl.design.instances)
    stages = {name: one.stages for name, one in rtl.scheduled.items()}
    if isinstance(config, EngineConfig):
        stages[multiply.NAME] = multiply.stages(config)
    return EngineRtl({**rtl.files, **shell, f"{TOP}.sv": text}, stages, dict(instances))


def _content(config: AnyConfig) -> str:
    """A digest of all that determines the RTL: C++, the flow, its tools."""
    try:
        tools = [version(name) for name in ("xls-python", "ziglang")]
    except PackageNotFoundError as error:
        raise ToolError(f"a package of the extra `rtl` is missing: `pip install ahcq_plugin[rtl]` ({error})") from None
    files = [file for folder in ("include", "clang", "rtl", "templates") for file in sources(folder).rglob("*.*")]
    digest = hashlib.sha256(json.dumps([config.cpp, *tools]).encode())
    for file in sorted([*files, *Path(flow.__file__).parent.glob("*.py"), Path(__file__), Path(multiply.__file__)]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:24]


@cache
def simulation(config: AnyConfig = SMALLEST) -> Path:
    """The program that ``run`` starts; made where the cache of ``hls.rtl`` has none of this content.

    Raises:
        RtlError: a process cannot be scheduled. ToolError: a package of the extra ``rtl`` is missing or fails.
    """
    rtl = engine_rtl(config)
    bench = render("engine_bench.cpp.j2", dict(top=TOP, reads=reads(config), writes=writes(config)))
    model = sources("rtl", "pe", multiply.MODEL).read_text(encoding="utf-8")
    # With -O1 a cell runs a dozen times as fast after a minute of compiling; more cells take minutes, for few cycles.
    level = "-O1" if isinstance(config, EngineConfig) and config.cells == 1 else "-O0"
    return verilated({multiply.MODEL: model, **rtl.files}, TOP, bench, cache_folder(), level)


def run(
    image: Image,
    descriptors: Sequence[Descriptor],
    config: AnyConfig = SMALLEST,
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
        numbers += [stalls.reset_at, memory.latency]
        command = [simulation(config), words, report, *numbers, memory.bytes_per_second / CLOCK_HZ]
        subprocess.run(list(map(str, command)), check=True)
        found = np.fromfile(report, np.uint64).tolist()
        image.words[:] = np.fromfile(words, np.uint32)
    end, cycles, moved, *beats = found
    if end:
        raise RtlError(f"the engine did not end {len(descriptors)} commands: {_ENDS[end]}, after {cycles} cycles")
    ports = [*reads(config), *writes(config)]
    return RtlRun(cycles, moved, dict(zip(ports, beats, strict=True)))
