# SPDX-License-Identifier: Apache-2.0
"""Ways to run a SAM side by side: runners compute what the model does, a way that fails is a row, tables say all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from ahcq_plugin.studies.inference.artefacts import Subject, make
from ahcq_plugin.studies.inference.bench import Part, Row, measure
from ahcq_plugin.studies.inference.bench import _overlap as overlap
from ahcq_plugin.studies.inference.page import BEGIN, END, draw, keep_row, read_rows, table, write_page
from ahcq_plugin.studies.inference.runners import TorchSam, TorchSam2
from ahcq_plugin.studies.inference.variants import BASE, VARIANTS
from ahcq_plugin.studies.inference.workers import Worker, WorkerError
from ahcq_plugin.support.files import write_json
from tests.conftest import make_sam2

PARTS = (Part(0, 20.5, 21.0, 2.0, 300_000_000), Part(16, 9.0, 9.5, 0.5, 400_000_000))
ROWS = [
    Row("PyTorch", "FP32", PARTS, 12_000_000, 1.0, 8),
    Row("OpenVINO", "our deploy W8A8", PARTS, 4_000_000, 0.98, 8),
    Row("onnxruntime", "static INT8", (), 3_000_000, error="Fail: no kernel"),
]


@torch.no_grad()
def test_a_runner_gives_the_logits_of_sams_predictor(tiny_sam) -> None:
    image = np.random.default_rng(0).integers(0, 255, (tiny_sam.image_encoder.img_size,) * 2 + (3,), np.uint8)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    box = np.array([5.0, 6.0, 40.0, 50.0])
    runner = TorchSam(tiny_sam)
    features = runner.encode(tiny_sam.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None]))
    found = runner.decode(features, torch.from_numpy(box).float()[None])
    assert torch.equal(found[0, 0], torch.from_numpy(predictor.predict(box=box, multimask_output=False)[2][0]))


@torch.no_grad()
def test_a_runner_gives_the_logits_of_sam2s_image_predictor() -> None:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    model = make_sam2()
    predictor = SAM2ImagePredictor(model)
    side = model.image_size
    predictor._bb_feat_sizes = [(side // s, side // s) for s in (4, 8, 16)]
    image = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    predictor.set_image(image)
    box = np.array([5.0, 6.0, 40.0, 50.0])
    runner = TorchSam2(model)
    features = runner.encode(predictor._transforms(image)[None])
    found = runner.decode(features, torch.from_numpy(box).float()[None])
    wanted = predictor.predict(box=box, multimask_output=False)[2][0]
    assert torch.equal(found[0, 0], torch.from_numpy(wanted).clamp(found.min(), found.max()))


def test_overlap_counts_pixels_and_takes_two_empty_masks_for_equal() -> None:
    a = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]], bool)
    b = np.array([[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]], bool)
    assert overlap([a[:2], a[2:]], [b[:2], b[2:]]).tolist() == [0.5, 1.0, 0.0]


def test_a_table_has_every_way_that_runs_and_says_why_another_does_not() -> None:
    text = table(ROWS)
    lines = text.splitlines()
    assert lines[2] == "| PyTorch | FP32 | 20.5 / 21.0 (2.00×) | 9.0 / 9.5 (0.50×) | 300 / 400 | 12.0 | 1.000 |"
    assert lines[3].startswith("| **OpenVINO** | **our deploy W8A8** |")
    assert "- onnxruntime, static INT8: Fail: no kernel" in lines
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_rows_asked_with_other_numbers_of_boxes_have_gaps_and_peaks_that_compare(tmp_path: Path) -> None:
    more = Row("ahcq_plugin", "integers W4A4", (*PARTS, Part(64, 30.0, 31.0, 2.5, 900_000_000)), 4_000_000, 0.9, 8)
    text = table([ROWS[0], more])
    assert "| decoder, 16 boxes, ms | decoder, 64 boxes, ms |" in text
    assert "| 9.0 / 9.5 (0.50×) | – | 300 / 400 | 12.0 |" in text
    assert "| **9.0 / 9.5 (0.50×)** | **30.0 / 31.0 (2.50×)** | **300 / 400** | **4.0** |" in text
    draw({"sam": [ROWS[0], more]}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_page_keeps_its_text_and_gets_the_tables_of_all_models(tmp_path: Path) -> None:
    page = tmp_path / "inference.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{**vars(row), "parts": [vars(part) for part in row.parts]} for row in ROWS]
        write_json({"threads": 1, "rows": rows}, tmp_path / name / "rows.json")
    assert read_rows(tmp_path) == {"a": ROWS, "b": ROWS}
    write_page(read_rows(tmp_path), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.index("### a") < text.index("### b") and (tmp_path / "inference.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="inference:begin"):
        write_page({"a": ROWS}, page)


def test_ways_have_names_of_their_own() -> None:
    assert len({v.name for v in VARIANTS}) == len(VARIANTS) and BASE in VARIANTS


def test_a_way_that_cannot_be_opened_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"fp32\.safetensors"):
        Worker(BASE.name, Subject("sam_tiny", True), tmp_path, 1)


@pytest.mark.slow
def test_the_small_sam_in_some_ways(tmp_path: Path) -> None:
    """At 8 bits, integers give the masks of FP32 nearly always, from a smaller file."""
    subject = Subject("sam_tiny", True, 4)
    chosen = [v for v in VARIANTS if v.name in {BASE.name, "ahcq_plugin-integers-w8a8", "onnxruntime-fp32"}]
    make(subject, tmp_path, [v.files for v in chosen])
    assert {path.name for path in tmp_path.iterdir()} == {v.files for v in chosen}
    base, graphs, integers = measure(subject, tmp_path, chosen, [2], 1, images=4)
    assert base.iou == 1.0 and graphs.iou > 0.999 and integers.iou > 0.95
    assert integers.bytes < 0.5 * base.bytes and [part.boxes for part in integers.parts] == [0, 2]
    assert all(part.ratio > 0 and part.peak > 0 for row in (base, graphs, integers) for part in row.parts)


def test_a_row_takes_the_place_of_an_older_one_and_the_rest_stay(tmp_path):
    path = tmp_path / "a" / "rows.json"
    path.parent.mkdir()
    made = [replace(ROWS[0], runtime=way.runtime, computes=way.computes) for way in VARIANTS[:3]]
    for row in reversed(made):
        keep_row(row, 1, path)
    assert read_rows(tmp_path)["a"] == made, "in the order of the table"
    newer = replace(made[1], bytes=7)
    keep_row(newer, 1, path)
    assert read_rows(tmp_path)["a"] == [made[0], newer, made[2]]
    keep_row(newer, 2, path)
    assert read_rows(tmp_path)["a"] == [newer], "times of other numbers of threads do not stand beside"
