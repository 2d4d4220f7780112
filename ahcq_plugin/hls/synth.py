# SPDX-License-Identifier: Apache-2.0
"""Vitis HLS, where it is installed: write and run a ``run_hls.tcl`` and read what synthesis reports."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.render import render

STEPS = ("csim", "synth", "cosim", "export")


class SynthesisError(RuntimeError):
    """Vitis HLS is missing, failed, or left a report that cannot be read."""


@dataclass(frozen=True)
class SynthesisReport:
    """What ``csynth`` estimates for one top.

    Attributes:
        top, part: names.
        target_ns, estimated_ns: clock period that was asked for, and the one that is estimated.
        latency_cycles, interval_cycles: (least, greatest) of the whole function; None where it depends on arguments.
        used, available: BRAM_18K, DSP, FF, LUT, URAM.
    """

    top: str
    part: str
    target_ns: float
    estimated_ns: float
    latency_cycles: tuple[int | None, int | None]
    interval_cycles: tuple[int | None, int | None]
    used: dict[str, int]
    available: dict[str, int]

    @property
    def meets_timing(self) -> bool:
        """Whether the estimated period is at most the target."""
        return self.estimated_ns <= self.target_ns


def script(top: str, tops: Sequence[str], options: HLSOptions, bench: bool) -> str:
    """``run_hls.tcl`` of a folder with ``<top>.cpp``, which holds ``tops``; headers are in ``../include``.

    Args:
        options: part and clock.
        bench: whether there are ``<top>_tb.cpp`` and ``golden.dat``; else csim and cosim are left out.
    """
    period = f"{1000 / options.clock_mhz:.3f}"
    return render("run_hls.tcl.j2", dict(top=top, tops=tops, part=options.part, period_ns=period, bench=bench))


def find_vitis() -> str:
    """The path of ``vitis_hls``; SynthesisError if it is not on PATH."""
    path = shutil.which("vitis_hls")
    if path is None:
        raise SynthesisError("vitis_hls is not on PATH: source the settings64.sh of Vitis HLS, or leave --synth out")
    return path


def synthesize(folder: Path, top: str, until: str = "synth", timeout_s: float | None = None) -> SynthesisReport:
    """Run ``run_hls.tcl`` of the layer in ``folder`` up to the step ``until`` and read the report of ``top``.

    Raises:
        ValueError: ``until`` is no step after csim.
        SynthesisError: Vitis HLS is missing, ends with a non-zero status, or wrote no report.
    """
    if until not in STEPS[1:]:
        raise ValueError(f"`until` must be one of {', '.join(STEPS[1:])}, got {until!r}")
    command = [find_vitis(), "-f", "run_hls.tcl", "-tclargs", until, top]
    with open(folder / "vitis_hls.out", "w", encoding="utf-8") as log:
        run = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s)
    said = (folder / "vitis_hls.out").read_text(encoding="utf-8", errors="replace")[-2000:]
    if run.returncode:
        raise SynthesisError(f"vitis_hls ended with status {run.returncode} on {top} (step {until}):\n{said}")
    path = folder / f"project_{top}" / "solution" / "syn" / "report" / f"{top}_csynth.xml"
    if not path.is_file():
        raise SynthesisError(f"vitis_hls ended well, but there is no report {path.name} of {top}:\n{said}")
    return read_report(path)


def read_report(path: Path) -> SynthesisReport:
    """The numbers of a ``<top>_csynth.xml``; SynthesisError naming what is missing or no number."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise SynthesisError(f"{path.name} is not valid XML (truncated?): {error}") from error
    latency, timing = "PerformanceEstimates/SummaryOfOverallLatency", "PerformanceEstimates/SummaryOfTimingAnalysis"
    return SynthesisReport(
        top=_text(root, path, "UserAssignments/TopModelName"),
        part=_text(root, path, "UserAssignments/Part"),
        target_ns=_number(root, path, "UserAssignments/TargetClockPeriod"),
        estimated_ns=_number(root, path, f"{timing}/EstimatedClockPeriod"),
        latency_cycles=(
            _cycles(root, path, f"{latency}/Best-caseLatency"),
            _cycles(root, path, f"{latency}/Worst-caseLatency"),
        ),
        interval_cycles=(
            _cycles(root, path, f"{latency}/Interval-min"),
            _cycles(root, path, f"{latency}/Interval-max"),
        ),
        used=_resources(root, path, "AreaEstimates/Resources"),
        available=_resources(root, path, "AreaEstimates/AvailableResources"),
    )


def _text(root: ElementTree.Element, path: Path, where: str) -> str:
    node = root.find(where)
    if node is None or not (node.text or "").strip():
        raise SynthesisError(f"{path.name} has no {where}; is it the csynth report of Vitis HLS 2020.1 or later?")
    return node.text.strip()


def _number(root: ElementTree.Element, path: Path, where: str) -> float:
    text = _text(root, path, where)
    try:
        return float(text)
    except ValueError:
        raise SynthesisError(f"{path.name}: {where} must be a number, got {text!r}") from None


def _cycles(root: ElementTree.Element, path: Path, where: str) -> int | None:
    """None for ``undef`` and ``?``, what stands there when a loop's bound is an argument."""
    return None if _text(root, path, where) in ("undef", "?", "-") else int(_number(root, path, where))


def _resources(root: ElementTree.Element, path: Path, where: str) -> dict[str, int]:
    names = ("BRAM_18K", "DSP", "FF", "LUT", "URAM")
    return {name: int(_number(root, path, f"{where}/{name}")) for name in names}
