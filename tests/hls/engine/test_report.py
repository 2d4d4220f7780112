# SPDX-License-Identifier: Apache-2.0
"""The hardware report: sums, gaps as gaps, the paper's figures, the page."""

from __future__ import annotations

import json

import pytest

from ahcq_plugin.hls.engine import report
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.cycles import Output, cycles
from ahcq_plugin.hls.engine.launches import Launch
from ahcq_plugin.hls.engine.rtl import EngineRtl
from ahcq_plugin.hls.engine.shape import Shape
from ahcq_plugin.hls.rtl.cells import Cells

RTL = EngineRtl({}, {"a_process": 2, "b_process": 35}, {"a_process": 1, "b_process": 8}, 1)
A, B = Cells(100, 50, 1, 0.0, 4, 80), Cells(30, 20, 2, 0.5, 1, 25)
LAYER = Shape("linear", "uniform", 4, 4, 15, 0, (768,), 1, 1, 4096, 768)
SCORES = Shape("av", "table", 4, 4, 2**16, 0, (196,), 1, 300, 196, 64)
WORKLOADS = {"encoder": [Launch("u", "fc", LAYER, Output()), Launch("u", "matmul_1", SCORES, Output())]}


def test_the_sum_counts_every_instance_and_knows_what_it_does_not_know() -> None:
    *_, whole = report.process_rows(RTL, {"a_process": A, "b_process": B})
    assert (whole["lut"], whole["ff"], whole["dsp"], whole["bram"], whole["instances"]) == (340, 210, 17, 4.0, 9)
    first, second, whole = report.process_rows(RTL, {"a_process": A})
    assert first["lut"] == 100 and second["lut"] is None and second["stages"] == 35 and whole["lut"] is None


def test_rows_of_the_model_are_the_model() -> None:
    rows = report.model_rows(WORKLOADS, [2])
    for row, config in zip(rows, (PAPER, EngineConfig(2, 17)), strict=True):
        one, two = cycles(LAYER, config), cycles(SCORES, config)
        assert row["cycles"] == one.cycles + two.cycles and row["gmacs"] == (one.macs + two.macs) / 1e9
        assert row["without_av"] == pytest.approx(one.utilisation(config))
    shares = [row["share"] for row in report.layer_rows(WORKLOADS["encoder"], PAPER)]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_the_page_has_the_figures_and_dashes_for_gaps(tmp_path) -> None:
    row = dict(unit="<unit>", name="fc", kind="linear", family="uniform", outputs=1234567, different_cpp=0)
    row |= dict(different_rtl=None, cycles=None, model=99)
    figures = dict(
        config="ahcq::engine::cells<1, 4>",
        matmuls=[row],
        processes=report.process_rows(RTL, {"a_process": A}),
        model=report.model_rows(WORKLOADS, [2, 4]),
        layers=report.layer_rows(WORKLOADS["encoder"], PAPER),
        frames=report.frames_paragraph(481.2, 7.0, PAPER, 32.0),
    )
    data, page = report.write_report(tmp_path, figures)
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["paper"]["INT4"]["frames"] == 33.82 and found["gaps"] == list(report.GAPS)
    assert found["matmuls"][0]["cycles"] is None
    text = page.read_text(encoding="utf-8")
    assert "307.2 GMAC/s; divided by 33.82 frames that is 9.1 GMAC a frame" in text
    assert "1,234,567" in text and "&lt;unit&gt;" in text and "177,001" in text
    assert "<td>–</td>" in text and all(gap.split(",")[0] in text for gap in report.GAPS if "'" not in gap)
    assert "://" not in text  # nothing from outside
