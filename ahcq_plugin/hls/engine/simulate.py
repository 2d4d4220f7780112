# SPDX-License-Identifier: Apache-2.0
"""The engine's C++ compiled by g++ and run beside a simulated memory, called from Python."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ahcq_plugin.hls.csim import compile_cpp, compiler
from ahcq_plugin.hls.engine.config import CHUNKS, LANES, PAPER, AnyConfig, EngineConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.shape import last_chunks
from ahcq_plugin.hls.resources import ap_types, sources
from ahcq_plugin.support.kept_file import kept_file
from ahcq_plugin.support.user_cache import user_cache

FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-fPIC")
DEPTH = 64  # of the streams of a run that no clock measures
CLOCKED_DEPTH = 8
_ACCUMULATORS = np.dtype([("multiply", np.int64, LANES), ("shift", np.int64, LANES)])
DDR_BYTES_PER_SECOND = 12e9
CLOCK_HZ = 300e6


@dataclass(frozen=True, eq=False)
class Run:
    """What a simulated program did.

    Attributes:
        turns: process -> iterations of its pipelined loop; of a process that every cell has, all together.
        cycles: rounds, clock cycles where the run was clocked.
        ddr_bytes: moved, in whole granules of 64 bytes.
        accumulators: for each cell a structured array with ``multiply`` and ``shift`` (int64, 8), in the order of the
            sequencer, a group's chunk after the other; None unless they were asked for.
    """

    turns: dict[str, int]
    cycles: int
    ddr_bytes: int
    accumulators: tuple[np.ndarray, ...] | None


@cache
def library(config: AnyConfig) -> ctypes.CDLL:
    """The engine of ``config``.

    Raises:
        BuildError: g++ is missing or fails.
    """
    run = "run" if isinstance(config, EngineConfig) else "run_floats"
    loaded = compiled("engine", f"-DAHCQ_CONFIG={config.cpp}", f"-DAHCQ_RUN={run}")
    for name in ("cycles", "bytes", "processes", "turns", "tapped"):
        getattr(loaded, f"ahcq_engine_{name}").restype = ctypes.c_uint64
    loaded.ahcq_engine_process.restype = ctypes.c_char_p
    loaded.ahcq_engine_taps.restype = ctypes.c_void_p
    return loaded


def compiled(name: str, *defines: str) -> ctypes.CDLL:
    """``csim/engine/<name>_api.cpp``; compiled where the cache has none for these sources, flags and compiler.

    The cache is :func:`~ahcq_plugin.support.user_cache.user_cache`.

    Raises:
        BuildError: g++ is missing or fails.
    """
    include, harness = sources("include"), sources("csim", "engine")
    files = sorted([*include.rglob("*.h"), *harness.iterdir()])
    version = subprocess.run([compiler()[-1], "--version"], capture_output=True, text=True, check=True).stdout
    content = hashlib.sha256("\n".join([*defines, version, *FLAGS]).encode())
    for file in files:
        content.update(file.name.encode() + file.read_bytes())
    path = user_cache() / f"{name}-{content.hexdigest()[:24]}.so"

    def make(made: Path) -> None:
        given = [harness / f"{name}_api.cpp", "-o", made]
        places = [f"-I{harness}", f"-I{include}", "-isystem", sources("csim", "include"), "-isystem", ap_types()]
        compile_cpp(list(map(str, [*FLAGS, *defines, *places, "-shared", *given])), made.parent)

    return ctypes.CDLL(str(kept_file(path, make)))


def run(
    image: Image,
    descriptors: Sequence[Descriptor],
    config: AnyConfig = PAPER,
    clocked: bool = False,
    accumulators: bool = False,
    ddr_bytes_per_second: float = DDR_BYTES_PER_SECOND,
) -> Run:
    """Put the descriptors into ``image`` and let the engine execute them there.

    Args:
        clocked: let all processes make one turn a cycle, and wait for a DDR of ``ddr_bytes_per_second`` at 300 MHz.
        accumulators: keep what ``dequantize`` gets.
    Raises:
        BuildError: the engine cannot be compiled.
        RuntimeError: the processes wait for each other, or an address is beyond the memory.
    """
    words = np.frombuffer(b"".join(d.encode() for d in descriptors), np.uint32)
    program = image.place(words)
    engine = library(config)
    status = engine.ahcq_engine_run(
        image.words.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint64(len(image.words)),
        ctypes.c_uint32(program),
        ctypes.c_uint32(len(descriptors)),
        int(clocked),
        ctypes.c_double(ddr_bytes_per_second / CLOCK_HZ),
        int(accumulators),
        CLOCKED_DEPTH if clocked else DEPTH,
    )
    if status:
        reason = "its processes wait for each other" if status == 1 else "an address lies beyond the memory"
        raise RuntimeError(f"the engine did not end {len(descriptors)} commands: {reason}")
    turns: dict[str, int] = {}
    for index in range(engine.ahcq_engine_processes()):
        name = engine.ahcq_engine_process(ctypes.c_uint64(index)).decode().removesuffix("<C>")
        turns[name] = turns.get(name, 0) + engine.ahcq_engine_turns(ctypes.c_uint64(index))
    kept = tuple(_taps(engine, cell) for cell in range(config.cells)) if accumulators else None
    return Run(turns, engine.ahcq_engine_cycles(), engine.ahcq_engine_bytes(), kept)


def _taps(engine: ctypes.CDLL, cell: int) -> np.ndarray:
    count = engine.ahcq_engine_tapped(cell)
    if not count:
        return np.zeros(0, _ACCUMULATORS)
    return np.frombuffer(ctypes.string_at(engine.ahcq_engine_taps(cell), count * _ACCUMULATORS.itemsize), _ACCUMULATORS)


def in_order(kept: Sequence[np.ndarray], descriptor: Descriptor, config: EngineConfig) -> np.ndarray:
    """int64 (batch, m, n, lanes) of the accumulators of one command, as ``golden.run`` has them."""
    d, hluq = descriptor, descriptor.family == 1 and descriptor.groups == 1
    tiles = -(-d.n // (CHUNKS * LANES))
    lanes = 2 if hluq else d.groups
    result = np.zeros((d.batch, d.m + config.cells, tiles * CHUNKS, LANES, lanes), np.int64)
    for cell, values in enumerate(kept):
        at = 0
        for product in range(d.batch):
            for first in range(0, d.m, d.block_rows):
                rows = np.arange(first, min(first + d.block_rows, d.m), config.cells) + cell
                for tile in range(tiles):
                    chunks = last_chunks(d.n, d.groups) if tile == tiles - 1 else CHUNKS
                    shape = (len(rows), d.groups, chunks)
                    part = values[at : at + int(np.prod(shape))].reshape(shape)
                    at += part.size
                    sums = [part["multiply"][:, g] for g in range(d.groups)]
                    sums += [part["shift"][:, 0]] if hluq else []
                    place = tile * CHUNKS
                    result[product, rows, place : place + chunks] = np.stack(sums, axis=-1)
        if at != len(values):
            raise RuntimeError(f"cell {cell} gave {len(values)} sets of accumulators, expected {at}")
    return result[:, : d.m].reshape(d.batch, d.m, -1, lanes)[:, :, : d.n]
