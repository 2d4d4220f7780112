# SPDX-License-Identifier: Apache-2.0
"""Vitis HLS from outside: its report in the documented format, its exit status, its absence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ahcq_plugin.hls import flow, registers, synth

REPORT = Path(__file__).with_name("csynth_report.xml")


@pytest.fixture
def vitis(tmp_path, monkeypatch):
    """A stand-in for vitis_hls that does what the shell lines given to it say, in the layer's folder."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "vitis_hls"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        layer = tmp_path / "ahcq_layer"
        layer.mkdir()
        return layer

    return install


def test_every_number_of_the_report_is_read() -> None:
    report = synth.read_report(REPORT)
    assert (report.top, report.part) == ("ahcq_layer", "xczu9eg-ffvb1156-2-e")
    assert (report.target_ns, report.estimated_ns, report.meets_timing) == (3.33, 2.431, True)
    assert report.latency_cycles == (231, None)  # undef: depends on the number of rows
    assert report.interval_cycles == (180, None)
    assert report.used == {"BRAM_18K": 12, "DSP": 6, "FF": 10482, "LUT": 40321, "URAM": 0}
    assert report.available["LUT"] == 274080
    assert flow.synthesis_entry(report)["meets_timing"] is True


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<TopModelName>ahcq_layer</TopModelName>", "", "has no UserAssignments/TopModelName"),
        ("<LUT>40321</LUT>", "<LUT>many</LUT>", "Resources/LUT must be a number, got 'many'"),
        ("</profile>", "", "not valid XML"),
    ],
)
def test_a_broken_report_is_named(tmp_path, old: str, new: str, message: str) -> None:
    text = REPORT.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "report.xml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(synth.SynthesisError, match=message):
        synth.read_report(tmp_path / "report.xml")


def test_synthesis_runs_the_script_and_reads_its_report(vitis) -> None:
    place = "project_ahcq_layer/solution/syn/report"
    layer = vitis(f'echo "$@" > arguments && mkdir -p {place} && cp ../report.xml {place}/ahcq_layer_csynth.xml')
    shutil.copy(REPORT, layer.parent / "report.xml")
    assert synth.synthesize(layer, "ahcq_layer", "cosim").used["FF"] == 10482
    assert (layer / "arguments").read_text().split() == ["-f", "run_hls.tcl", "-tclargs", "cosim", "ahcq_layer"]


def test_a_failed_run_is_an_error_with_what_it_said(vitis) -> None:
    layer = vitis("echo 'ERROR: no licence'; exit 3")
    with pytest.raises(synth.SynthesisError, match=r"status 3 on ahcq_layer \(step synth\)(.|\n)*no licence"):
        synth.synthesize(layer, "ahcq_layer")


def test_success_without_a_report_is_an_error(vitis) -> None:
    with pytest.raises(synth.SynthesisError, match="no report ahcq_layer_csynth.xml"):
        synth.synthesize(vitis("exit 0"), "ahcq_layer")


def test_without_vitis_the_error_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(synth.SynthesisError, match="not on PATH: source"):
        synth.find_vitis()
    with pytest.raises(ValueError, match="must be one of synth, cosim, export, got 'csim'"):
        synth.synthesize(tmp_path, "ahcq_layer", "csim")


def test_addresses_of_the_driver_header_win() -> None:
    text = """
#define XAHCQ_LAYER_CONTROL_ADDR_AP_CTRL     0x000
#define XAHCQ_LAYER_CONTROL_ADDR_ROWS_DATA   0x010
#define XAHCQ_LAYER_CONTROL_BITS_ROWS_DATA   32
#define XAHCQ_LAYER_CONTROL_ADDR_SCALES_BASE 0x200
#define XAHCQ_LAYER_CONTROL_ADDR_SCALES_HIGH 0x3ff
"""
    assert registers.read_driver_header(text, ["rows", "scales"]) == {"control": 0, "rows": 0x10, "scales": 0x200}
    with pytest.raises(ValueError, match="no address of batch"):
        registers.read_driver_header(text, ["batch"])
