# SPDX-License-Identifier: Apache-2.0
"""The engine for the vendor's tools: a folder for Vitis HLS."""

from __future__ import annotations

import shutil
from pathlib import Path

from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.rtl import TOP
from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.synth import script
from ahcq_plugin.support.files import replacing_folder

_STREAMS = ("requests", "beats", "results_out", "written", "finished")


def write_vitis(folder: Path, config: EngineConfig, options: HLSOptions | None = None) -> Path:
    """Write ``include/`` and ``ahcq_engine/`` with the top function and its ``run_hls.tcl``, in place of ``folder``.

    The ports are the streams behind which ``ahcq_axi_read.sv`` and ``ahcq_axi_write.sv`` stand. There is no test bench:
    the steps are synth and export. ``hls.synth.synthesize(folder / "ahcq_engine", "ahcq_engine")`` runs it.

    Args:
        options: part and clock; None: the ZCU102's at 300 MHz.
    """
    with replacing_folder(folder) as work:
        shutil.copytree(sources("include"), work / "include")
        place = work / TOP
        place.mkdir()
        text = render("engine_top.cpp.j2", dict(top=TOP, config=config.cpp, streams=_STREAMS))
        (place / f"{TOP}.cpp").write_text(text, encoding="utf-8")
        (place / "run_hls.tcl").write_text(script(TOP, [TOP], options or HLSOptions(), bench=False), encoding="utf-8")
    return folder
