# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from ahcq_plugin.studies import challenges, challenges_page
from ahcq_plugin.studies.challenges import CALIBRATED, CHALLENGES, RECONSTRUCTED, Cell, cells, fill, read_cell
from ahcq_plugin.studies.hardness import statistics
from ahcq_plugin.zoo.hard import SAM_TINY_HARD, knobs
from tests.conftest import make_tiny_items, make_tiny_sam

METHODS = CALIBRATED[:2]


@pytest.fixture
def runs(monkeypatch):
    """The tiny SAM in place of ``sam_tiny``, and figures that follow from the name in place of a quantization."""
    made: list[str] = []

    def measured(cell, calibration, held_out, expected):
        made.append(cell.name)
        level = 0.9 if cell.method.recipe == "ahcq" else 0.5
        return [[level, level], [level - 0.1 * (cell.challenge == "all")], []]

    monkeypatch.setattr(challenges, "build_sam", lambda name: make_tiny_sam())
    monkeypatch.setattr(challenges, "_data", lambda: iter([make_tiny_items(), make_tiny_items()]))
    monkeypatch.setattr(challenges, "measure", measured)
    return made


def test_cells_are_run_once_extremes_first(runs, tmp_path) -> None:
    wanted = cells(METHODS)
    assert [cell.name for cell in wanted[:4]] == ["none-rtn", "none-ahcq", "all-rtn", "all-ahcq"]
    fill(tmp_path, wanted)
    assert runs == [cell.name for cell in wanted] and len(runs) == 2 * (2 + len(knobs()))
    fill(tmp_path, wanted)
    assert len(runs) == len(wanted)
    assert read_cell(tmp_path, wanted[1]) == [[0.9, 0.9], [0.9], []]


def test_another_setting_makes_figures_stale(runs, tmp_path, monkeypatch) -> None:
    cell = Cell("channels", METHODS[0])
    fill(tmp_path, [cell])
    monkeypatch.setitem(CHALLENGES, "channels", replace(SAM_TINY_HARD.only("channels"), channels=7.0))
    assert read_cell(tmp_path, cell) is None


def test_other_weights_make_figures_stale(runs, tmp_path, monkeypatch) -> None:
    cell = Cell("none", METHODS[0])
    fill(tmp_path, [cell])
    (tmp_path / "other.pth").write_bytes(b"other weights")
    monkeypatch.setattr(challenges, "default_checkpoint", lambda name: tmp_path / "other.pth")
    assert read_cell(tmp_path, cell) is None


def test_every_cell_has_a_file_and_a_key_of_its_own() -> None:
    every = cells([*CALIBRATED, *RECONSTRUCTED])
    assert len({cell.name for cell in every}) == len({cell.key() for cell in every}) == len(every)


def test_only_what_is_said_to_be_learned_is_learned() -> None:
    assert {method.settings().granularity for method in CALIBRATED} == {"none"}
    assert {method.settings().granularity for method in RECONSTRUCTED} == {"unit"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m.label == "rtn + equalization" else pytest.mark.slow) for m in CALIBRATED]
)
def test_a_cell_measures_a_quantized_twin(method, monkeypatch) -> None:
    monkeypatch.setattr(challenges, "build_sam", lambda name: make_tiny_sam())
    items = make_tiny_items()
    with torch.no_grad():
        expected = [challenges.box_forward(make_tiny_sam(), item)[0] for item in items]
    found = challenges.measure(Cell("all", method), items, items, expected)
    assert [len(image) for image in found] == [1, 2, 3]
    assert all(0 <= value <= 1 for image in found for value in image) and any(v < 1 for image in found for v in image)


def test_tables_show_intervals_differences_and_gaps(runs, tmp_path) -> None:
    fill(tmp_path, [cell for cell in cells(METHODS) if cell.challenge in ("none", "all")])
    table = challenges_page.overlap_table(tmp_path, CALIBRATED[:3]).splitlines()
    assert table[0] == "| method | none | all |"  # what no method has been run on is no column
    assert table[3] == "| ahcq | 0.900 [0.900, 0.900] | 0.867 [0.800, 0.900] |"
    assert table[4].split(" | ")[1:] == ["–", "– |"]
    differences = challenges_page.difference_table(tmp_path, METHODS, METHODS[0]).splitlines()
    assert len(differences) == 3 and "| ahcq | **+0.400 [+0.400, +0.400]** |" in differences[2]
    picture = tmp_path / "overlaps.png"
    assert challenges_page.draw_overlaps(tmp_path, METHODS, picture) and picture.read_bytes().startswith(b"\x89PNG")
    assert not challenges_page.draw_overlaps(tmp_path / "none", METHODS, tmp_path / "no.png")


def test_the_table_of_statistics_has_every_figure(runs, monkeypatch) -> None:
    monkeypatch.setattr(challenges_page, "_items", lambda: iter(make_tiny_items()))
    lines = challenges_page.statistics_table().splitlines()
    names = statistics(make_tiny_sam(), make_tiny_items(), challenges.box_forward)
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:-1]] == list(names)
    counts = [int(text[0]) for text in lines[-1].split(" | ") if text.endswith(" of 7")]
    assert len(counts) == 3 and counts[0] < min(counts[1:])
