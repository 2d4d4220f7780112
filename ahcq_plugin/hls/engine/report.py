# SPDX-License-Identifier: Apache-2.0
"""``hw_report.json`` and its page: what RTL and synthesis gave, the cycle model, beside the paper's table IV.

A figure that nobody measured is None, and a dash on the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ahcq_plugin.hls.engine.config import LANES, NIBBLE, PAPER, PES, EngineConfig
from ahcq_plugin.hls.engine.counts import BOARD, CELL_PROCESSES
from ahcq_plugin.hls.engine.cycles import CLOCK_HZ, DDR
from ahcq_plugin.hls.engine.launches import Launch
from ahcq_plugin.hls.engine.performance import by_layer, sam_launches, total
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.support.files import write_json, write_text

FORMAT = "ahcq_plugin.hls.engine.report/4"
#: Table IV of the paper: SAM-B on a ZCU102 at 300 MHz.
PAPER_TABLE = {
    "FP32": dict(lut=150540, dsp=1886, bram=253, lanes=16, frames=4.75, gops_per_watt=7.21),
    "INT8": dict(lut=183505, dsp=453, bram=146, lanes=64, frames=16.34, gops_per_watt=25.11),
    "INT4": dict(lut=177001, dsp=474, bram=243, lanes=128, frames=33.82, gops_per_watt=47.73),
}
PAPER_FRAMES = 33.82
BOXES = (1, 5, 20, 100)
GAPS = (
    "LUT, DSP and BRAM after placement: the counts are of mapped netlists, process by process",
    "clock frequency: 300 MHz is the paper's, nothing here was placed and routed",
    "power; of energy there is an estimate of ratios between processing elements",
    "what LayerNorm, softmax and positions take on the host, which the frames a second leave out",
    "RTL of more than four cells in a simulation: only their C++ has run",
)


def buffer_bytes(config: EngineConfig) -> dict[str, int]:
    """Bytes of the double buffers on the chip: of the left operands in all cells, of the right ones."""
    return dict(left=config.cells * 2 * config.left_depth * 32, right=2 * config.right_depth * PES * LANES // 2)


def model_rows(workloads: Mapping[str, Sequence[Launch]], cells: Sequence[int]) -> list[dict[str, Any]]:
    """The cycle model of each workload at 300 MHz and 12 GB/s, for numbers of cells and both widths of digits."""
    rows = []
    for what, launches in workloads.items():
        for number in cells:
            for digit in (NIBBLE, 17):
                whole = total(launches, EngineConfig(number, digit))
                others = total([one for one in launches if one.shape.kind != "av"], EngineConfig(number, digit))
                row = dict(what=what, cells=number, digit=digit, gmacs=whole.macs / 1e9, cycles=whole.cycles)
                row |= dict(utilisation=whole.utilisation, without_av=others.utilisation, gmacs_per_second=whole.gmacs)
                rows.append(row | dict(per_second=whole.per_second, ddr_bytes=whole.ddr_bytes, limits=whole.limits))
    return rows


def layer_rows(launches: Sequence[Launch], config: EngineConfig, most: int = 12) -> list[dict[str, Any]]:
    """The layers with the most cycles of a workload: share of cycles, utilisation, what limits."""
    rows = []
    for row in by_layer(launches, config)[:most]:
        shape = row.launch.shape
        size = f"{shape.m} x {shape.k} x {shape.n}, {shape.batch}"
        limit = max(row.one.limits, key=row.one.limits.__getitem__)
        rows.append(dict(kind=shape.kind, family=shape.family, size=size, count=row.count, share=row.share))
        rows[-1] |= dict(utilisation=row.one.utilisation(config), limit=limit)
        rows[-1] |= dict(macs_per_byte=row.one.macs / row.one.ddr_bytes, roof=row.roof(config, DDR()))
        rows[-1]["gmacs_per_second"] = row.one.macs / row.one.cycles * CLOCK_HZ / 1e9
    return rows


def model_figures(cells: Sequence[int]) -> dict[str, Any]:
    """``model``, ``layers``, ``frames`` of the report: SAM-B's encoder, and its decoder for some numbers of boxes."""
    workloads = {f"SAM-B {name}": launches for name, launches in sam_launches("vit_b", BOXES).items()}
    rows = model_rows(workloads, cells)
    encoder, five = (
        next(row for row in rows if row["what"] == what and row["cells"] == cells[0] and row["digit"] == 17)
        for what in ("SAM-B encoder", "SAM-B decoder, 5 boxes")
    )
    return dict(
        model=rows,
        layers=layer_rows(workloads["SAM-B encoder"], PAPER),
        frames=frames_paragraph(encoder["gmacs"], five["gmacs"], PAPER, five["per_second"]),
    )


def frames_paragraph(encoder_gmacs: float, decoder_gmacs: float, config: EngineConfig, per_second: float) -> str:
    """What the paper's 33.82 frames a second can mean.

    Args:
        encoder_gmacs, decoder_gmacs: 10^9 multiply-accumulates of SAM-B's encoder, of its decoder for five boxes.
        per_second: what the model gives for that decoder.
    """
    peak = config.lanes * CLOCK_HZ / 1e9
    return (
        f"{config.lanes // 8} x 8 lanes at 300 MHz make at most {peak:.1f} GMAC/s; divided by {PAPER_FRAMES} frames "
        f"that is {peak / PAPER_FRAMES:.1f} GMAC a frame. The quantized matmuls of SAM-B's encoder at 1024 x 1024 need "
        f"{encoder_gmacs:.0f} GMAC, {peak / encoder_gmacs:.2f} frames a second at full use of every lane, whatever the "
        f"design. Its decoder for five boxes needs {decoder_gmacs:.1f} GMAC, for which this model gives "
        f"{per_second:.1f} a second. So the figure fits about five boxes in the decoder with the image embedded "
        "before, not a whole frame; the paper does not say what its frame holds."
    )


def write_report(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """``hw_report.json`` and ``hw_report.html`` in ``folder``, atomically; their paths.

    Args:
        report: ``config``, ``counted``, ``matmuls``, ``processes``, ``elements``, ``sizes``, ``engines``, ``toggles``,
            and those of ``model_figures``; the rest is added here.
    """
    whole = dict(format=FORMAT, paper=PAPER_TABLE, board=BOARD, buffers=buffer_bytes(PAPER), gaps=list(GAPS), **report)
    names = [row["process"] for row in whole["processes"][:-2]]  # without joins and sum
    diagram = {
        "once": [name for name in names if name not in CELL_PROCESSES],
        "in every cell": [name for name in CELL_PROCESSES if name in names],
    }
    environment = Environment(
        loader=FileSystemLoader(sources("templates")),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, log10=math.log10)
    write_json(whole, folder / "hw_report.json")
    write_text(environment.get_template("hw_report.html.j2").render(whole, diagram=diagram), folder / "hw_report.html")
    return [folder / "hw_report.json", folder / "hw_report.html"]


def number(value: float | None, digits: int = 0) -> str:
    """With thousands in groups; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"
