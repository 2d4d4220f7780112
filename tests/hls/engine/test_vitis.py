# SPDX-License-Identifier: Apache-2.0
"""The engine's folder for Vitis HLS: its top is C++ as Vitis takes it, its script has the steps that it can make."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ahcq_plugin.hls.csim import compiler, include_flags
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.vitis import write_vitis
from ahcq_plugin.hls.options import HLSOptions


@pytest.mark.parametrize("softmax", [False, True])
def test_the_top_compiles_as_cpp_14_and_names_every_port(tmp_path: Path, softmax: bool) -> None:
    config = EngineConfig(cells=2, softmax=softmax)
    folder = write_vitis(tmp_path / "hls", config, HLSOptions(clock_mhz=200)) / "ahcq_engine"
    flags = ["-std=c++14", "-fsyntax-only", "-w", *include_flags(folder.parent / "include", folder)]
    done = subprocess.run([*compiler(), *flags, "ahcq_engine.cpp"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (folder / "ahcq_engine.cpp").read_text(encoding="utf-8")
    streams = re.findall(r"hls::stream<\w+> ?\(?& ?(\w+)", text)
    assert len(streams) == 5 and re.findall(r"axis port = (\w+)", text) == streams


def test_its_script_has_no_step_that_wants_a_test_bench(tmp_path: Path) -> None:
    folder = write_vitis(tmp_path / "hls", EngineConfig())
    script = (folder / "ahcq_engine" / "run_hls.tcl").read_text(encoding="utf-8")
    for wanted in ("set_top $top", "add_files ahcq_engine.cpp", "-period 3.333", "csynth_design", "export_design"):
        assert wanted in script
    assert not any(word in script for word in ("-tb", "csim_design", "cosim_design"))
    assert script.count("{") == script.count("}")
