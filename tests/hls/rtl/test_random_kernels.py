# SPDX-License-Identifier: Apache-2.0
"""Random kernels: what clang, XLS and the netlist make of them in Verilator is what g++ makes of the same C++."""

from __future__ import annotations

import importlib.util
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ahcq_plugin.hls.rtl import Program, Rtl, RtlError, ScheduleOptions, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.simulate import Stalls, build

_SPEC = importlib.util.spec_from_file_location("rtl_kernels", Path(__file__).with_name("kernels.py"))
kernels = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kernels)

# A design takes seconds to compile: what fails is shown, not shrunk.
SETTINGS = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])
STALLS = (Stalls(), Stalls(idle=0.4), Stalls(back=0.5, seed=2), Stalls(idle=0.3, back=0.3, reset_at=100, seed=3))


def rtl_of(program: Program) -> Rtl:
    """Short stages, so that there are many, unless a random circle does not fit into one."""
    try:
        return compile_rtl(program, "top", cache=cache_folder(), faults=True)
    except RtlError as error:
        assert "II = 1 is impossible for the process" in str(error)
        return compile_rtl(program, "top", ScheduleOptions(clock_ps=20_000), cache_folder(), faults=True)


def different(seeds: list[int], count: int = 150) -> dict[str, str]:
    """Name -> source of the kernels whose RTL gives another word, for each kind of stalls."""
    names = [f"k{i}" for i in range(len(seeds))]
    sources = [kernels.kernel(random.Random(seed), name) for seed, name in zip(seeds, names, strict=True)]
    source = kernels.program(sources, names)
    rng = np.random.default_rng(seeds)
    words = {name: rng.integers(0, 2**64, count, np.uint64) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        wanted = kernels.reference(Path(folder), source, names, words)
        rtl = rtl_of(Program(Path(folder) / "kernels.cpp"))
        simulation = build(rtl, cache_folder())
    inputs = {f"in_{name}": words[name].view(np.uint32).reshape(-1, 2) for name in names}
    found = {}
    for stalls in STALLS:
        expected = {f"out_{name}": len(wanted[name]) for name in names}
        result = simulation.run({"args": [count], **inputs}, expected, stalls, limit=100_000)
        for name, text in zip(names, sources, strict=True):
            got = np.ascontiguousarray(result.outputs[f"out_{name}"]).view(np.uint64).ravel()
            if not np.array_equal(got, wanted[name]):
                found[name] = text
    return found


@settings(SETTINGS, max_examples=1)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16, unique=True))
def test_rtl_of_random_kernels_is_equal(seeds: list[int]) -> None:
    assert different(seeds) == {}


@pytest.mark.slow
@settings(SETTINGS, max_examples=12)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24, unique=True))
def test_rtl_of_many_random_kernels_is_equal(seeds: list[int]) -> None:
    assert different(seeds) == {}
