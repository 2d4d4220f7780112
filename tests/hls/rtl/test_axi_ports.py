# SPDX-License-Identifier: Apache-2.0
"""The engine's AXI4 ports in cocotb, beside a memory that others wrote."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from ahcq_plugin.hls.cosim import read_results, simulator
from ahcq_plugin.hls.resources import sources

HERE = Path(__file__).parent


@pytest.mark.slow
def test_ports_are_the_memory(tmp_path, monkeypatch) -> None:
    from cocotb_tools.runner import get_runner

    monkeypatch.syspath_prepend(str(HERE))
    results = tmp_path / "results.xml"
    with simulator():
        get_runner("verilator").build(
            sources=[sources("rtl", "ahcq_axi_read.sv"), sources("rtl", "ahcq_axi_write.sv"), HERE / "axi_ports.sv"],
            hdl_toplevel="axi_ports",
            build_dir=tmp_path,
            build_args=["-Wno-fatal"],
            always=True,
        )
        with contextlib.suppress(RuntimeError, SystemExit):
            get_runner("verilator").test(
                test_module="axi_ports_bench",
                hdl_toplevel_lang="verilog",
                hdl_toplevel="axi_ports",
                build_dir=tmp_path,
                test_dir=tmp_path,
                results_xml=str(results),
                extra_env={"COCOTB_LOG_LEVEL": "WARNING", "PYTHONPATH": ":".join(sys.path)},
            )
    found = read_results(results)
    assert found.failed == {} and len(found.passed) == 2
