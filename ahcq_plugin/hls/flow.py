# SPDX-License-Identifier: Apache-2.0
"""What one does with a generated folder: run its test benches, keep what simulation and synthesis gave."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from ahcq_plugin.hls.csim import FLAGS, QUIET, compile_cpp, include_flags
from ahcq_plugin.hls.emit import FORMAT, MANIFEST
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.synth import SynthesisReport
from ahcq_plugin.support.files import read_json, replacing

REPORT = "report.json"


def manifest(folder: Path) -> list[dict]:
    """The layers of a generated folder, as ``layers.json`` lists them.

    Raises:
        FileNotFoundError: it is no generated folder. ValueError: of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it was not written by make_hls")
    content = read_json(path, "write it again")
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, this version reads {FORMAT!r}; write it again")
    layers = content.get("layers")
    rows = layers if isinstance(layers, list) else [None]
    if not all(isinstance(layer, dict) and isinstance(layer.get("top"), str) for layer in rows):
        raise ValueError(f"{path} does not list layers; write it again")
    return rows


def run_testbench(layer: Layer, folder: Path) -> tuple[bool, str]:
    """Compile the test bench of ``layer`` in the generated ``folder`` with g++ and run it.

    Returns:
        (equal to the golden model, what it printed).

    Raises:
        BuildError: g++ is missing or fails.
    """
    top, place = layer.top, (folder / layer.top).resolve()
    flags = [*FLAGS, *QUIET, *include_flags((folder / "include").resolve(), place)]
    compile_cpp([*flags, "-I.", "-c", f"{top}.cpp", "-o", f"{top}.o"], place)
    compile_cpp([*flags, "-I.", "-c", f"{top}_tb.cpp", "-o", f"{top}_tb.o"], place)
    compile_cpp([f"{top}.o", f"{top}_tb.o", "-o", "testbench"], place)
    run = subprocess.run([str(place / "testbench")], cwd=place, capture_output=True, text=True)
    return run.returncode == 0, run.stdout


def write_report(folder: Path, results: dict[str, dict[str, object]]) -> Path:
    """``report.json``: every layer of the manifest with what was measured of it, such as ``csim`` or ``synthesis``."""
    entries = [dict(entry, **results.get(entry["top"], {})) for entry in manifest(folder)]
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return folder / REPORT


def synthesis_entry(report: SynthesisReport) -> dict[str, object]:
    """A synthesis report as it stands in ``report.json``."""
    return dict(asdict(report), meets_timing=report.meets_timing)
