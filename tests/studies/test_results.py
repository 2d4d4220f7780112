# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from ahcq_plugin.mm.quantization_loop import STAGES
from ahcq_plugin.studies import results, results_tables
from ahcq_plugin.studies.results import Cell, cell_key, fill, read_cell
from ahcq_plugin.studies.results_suites import SUITES, TABLES, Row, Table
from ahcq_plugin.studies.results_tables import BEGIN, END, chart, markdown, update_readme
from ahcq_plugin.zoo.hard import Hardness

CONFIG = "mm_configs/sam_tiny_w4a4_yolox_nano_coco.py"
ROWS = (Row("rtn", Cell("rtn", 8)), Row("qdrop, 3 seeds", Cell("qdrop", 4), 3))
CELLS = [cell for row in ROWS for cell in row.cells()]


class Runs:
    """Stands for ``launch``: notes the calls, writes the figures that a run would write."""

    def __init__(self, fail=()):
        self.calls, self.fail = [], fail

    def __call__(self, config, work_dir, options, resume):
        name, seed = options["recipe.name"], options["recipe.seed"]
        self.calls.append((name, options["recipe.w_bits"], seed, resume))
        if name in self.fail:
            return 1
        figures = {"AP": 0.1234, "AP50": 0.25, "AP_gt": 0.3, "mIoU": 0.5 + 0.01 * seed, "IoU_fp": 0.9}
        metrics = {
            "fp": {k: v for k, v in figures.items() if k != "IoU_fp"},
            "quantized": figures,
            "stages": {name: {"seconds": 2.0, "peak_bytes": 3 * 2**20} for name in STAGES},
        }
        results.Path(work_dir).mkdir(parents=True)
        results.Path(work_dir, "metrics.json").write_text(json.dumps(metrics))
        return 0


def test_fills_what_is_missing_once(tmp_path):
    runs = Runs()
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[:1], runs) == []
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[:2], runs) == []
    assert runs.calls == [("rtn", 8, 0, True), ("qdrop", 4, 0, True)]


def test_a_failed_run_is_a_gap_and_is_tried_again(tmp_path):
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, Runs(fail=("rtn",))) == ["rtn_w8a8"]
    lines = markdown(CONFIG, tmp_path / "cells", ROWS).splitlines()
    assert "| rtn | W8A8 | – | – | – | – | – | – | – | – |" in lines
    # mean and sample standard deviation of 0.50, 0.51, 0.52
    assert (
        "| qdrop, 3 seeds | W4A4 | 0.123 ± 0.000 | 0.250 ± 0.000 | 0.300 ± 0.000 | 0.5100 ± 0.0100 | 0.9000 ± 0.0000 "
        "| 3 | 18 | 3 |"
    ) in lines
    assert "| rtn |" not in markdown(CONFIG, tmp_path / "cells", ROWS, gaps=False)
    assert "| floating point | 32 | 0.123 | 0.250 | 0.300 | 0.5000 | – | – | – | – |" in lines
    runs = Runs()
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, runs)
    assert runs.calls == [("rtn", 8, 0, True)]


def test_limits_have_a_column_where_runs_have_them(tmp_path):
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, Runs())
    without = markdown(CONFIG, tmp_path / "cells", ROWS)
    assert "95 %" not in without
    for seed, low in ((0, 0.85), (1, 0.87)):
        path = tmp_path / "cells" / f"{Cell('qdrop', 4, seed=seed).name}.json"
        stored = json.loads(path.read_text())
        stored["metrics"]["quantized"] |= {"IoU_fp_low": low, "IoU_fp_high": 0.93}
        path.write_text(json.dumps(stored))
    lines = markdown(CONFIG, tmp_path / "cells", ROWS).splitlines()
    assert "| IoU to FP | 95 % | seeds |" in lines[0]
    assert [line.split(" | ")[-4] for line in lines[2:]] == ["–", "–", "0.860–0.930"]
    assert len({line.count("|") for line in lines}) == 1


def test_stages_of_a_cell(tmp_path):
    assert results_tables.stages_table(CONFIG, tmp_path / "cells", CELLS[1]) == ""
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[1:2], Runs())
    lines = results_tables.stages_table(CONFIG, tmp_path / "cells", CELLS[1]).splitlines()
    assert lines[0] == "| stage of qdrop W4A4 | seconds | peak MB |" and "| reconstruct | 2.0 | 3 |" in lines


def test_a_chart_needs_figures(tmp_path):
    table, picture = Table("t", "Title", ROWS), tmp_path / "t.png"
    assert not chart(CONFIG, tmp_path / "cells", table, picture) and not picture.exists()
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, Runs())
    assert chart(CONFIG, tmp_path / "cells", table, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cell_may_be_of_a_config_of_its_own(tmp_path, monkeypatch):
    """Its key is of that config, and of how many images; not of where they lie."""
    tuned = "mm_configs/sam_tiny_w4a4_yolox_nano_tuned.py"
    cell = Cell("ahcq_plus", 4, config=tuned)
    assert cell.name == "ahcq_plus_w4a4-sam_tiny_w4a4_yolox_nano_tuned"
    given = []
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", [cell], lambda *args, **kw: given.append(args) or 1)
    assert given[0][0] == tuned
    assert cell_key(CONFIG, cell) == cell_key("mm_configs/none.py", cell) != cell_key(CONFIG, Cell("ahcq_plus", 4))
    before = cell_key(CONFIG, cell)
    monkeypatch.setenv("AHCQ_DATA", "elsewhere")
    monkeypatch.setattr(results, "_loaded", results.load_config)  # a process of its own reads the config again
    assert cell_key(CONFIG, cell) == before
    fewer = Cell("ahcq_plus", 4, (("test_cfg.calib.tune_images", 3),), config=tuned)
    assert cell_key(CONFIG, fewer) != before


def test_other_weights_make_figures_stale(tmp_path, monkeypatch):
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[:1], Runs())
    assert read_cell(tmp_path / "cells", CONFIG, CELLS[0]) is not None
    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(results, "default_checkpoint", lambda name: other)
    assert read_cell(tmp_path / "cells", CONFIG, CELLS[0]) is None


def test_figures_of_the_twin_depend_on_what_is_planted(monkeypatch):
    twin = "mm_configs/sam_tiny_hard_w4a4_yolox_nano_coco.py"
    before = [cell_key(config, CELLS[0]) for config in (twin, CONFIG)]
    monkeypatch.setattr(results, "SAM_TINY_HARD", Hardness(channels=2.0))
    after = [cell_key(config, CELLS[0]) for config in (twin, CONFIG)]
    assert before[0] != after[0] and before[1] == after[1]


def test_every_run_has_a_name_and_a_key_of_its_own():
    cells = {cell for table in TABLES for cell in table.cells()}
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell_key(CONFIG, cell) for cell in cells}) == len(cells)


def test_a_learning_rate_that_a_recipe_does_not_use_is_no_part_of_its_key():
    def keys(recipe):
        return {cell_key(CONFIG, Cell(recipe, 4, (("scale_lr", rate),))) for rate in (1e-3, 2e-3)}

    assert len(keys("qdrop")) == len(keys("ahcq")) == 2
    assert len(keys("rtn")) == len(keys("adaround")) == len(keys("brecq")) == 1


def test_names_of_runs():
    assert Cell("ahcq", 4, seed=2).name == "ahcq_w4a4-s2"
    assert (
        Cell("ahcq", 4, (("big", True), ("cag", False), ("cag_groups", 8))).name == "ahcq_w4a4-big-no_cag-cag_groups_8"
    )
    assert Cell("qdrop", 6, (("families.softmax", "agq"),)).name == "qdrop_w6a6-families_softmax_agq"


def test_first_seeds_come_first():
    table = Table("t", "Title", (Row("a", Cell("qdrop", 4), 2), Row("b", Cell("ahcq", 4), 2)))
    assert [cell.name for cell in table.cells()] == ["qdrop_w4a4", "ahcq_w4a4", "qdrop_w4a4-s1", "ahcq_w4a4-s1"]


def test_readme_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{BEGIN}\nold\n{END}\nrest\n")
    update_readme(readme, "| new |")
    update_readme(readme, "| new |")
    assert readme.read_text() == f"# A\n{BEGIN}\n| new |\n{END}\nrest\n"
    readme.write_text("# A")
    with pytest.raises(ValueError, match="has no <!-- results:begin --> ..."):
        update_readme(readme, "x")


@pytest.mark.parametrize("name", ["clips", "davis"])
def test_video_suites_show_video_figures(name, tmp_path):
    suite = SUITES[name]
    cells = {cell for table in suite.tables for cell in table.cells()}
    assert len({cell.name for cell in cells}) == len({cell_key(suite.config, cell) for cell in cells}) == len(cells)
    figures = {"J&F": 0.5, "J": 0.4, "F": 0.6}
    cell = suite.tables[0].rows[0].cell
    stages = {name: {"seconds": 2.0, "peak_bytes": 3 * 2**20} for name in STAGES}
    metrics = {"fp": figures, "quantized": figures | {"J_fp": 0.75}, "stages": stages}
    content = {"key": cell_key(suite.config, cell), "config": suite.config, "metrics": metrics}
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(content))
    lines = markdown(suite.config, tmp_path, suite.tables[0].rows, columns=suite.columns).splitlines()
    assert lines[0].startswith("| | bits | J&F | J | F | J to FP |")
    assert lines[2:4] == [
        "| floating point | 32 | 0.5000 | 0.4000 | 0.6000 | – | – | – | – |",
        "| rtn | W6A6 | 0.5000 | 0.4000 | 0.6000 | 0.7500 | 1 | 18 | 3 |",
    ]


@pytest.mark.parametrize("text", ["", "not JSON", "[]", "{}", '{"key": "a"}', '{"key": "a", "metrics": 3}'])
def test_damaged_figures_are_named(tmp_path, text):
    (tmp_path / f"{CELLS[0].name}.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{CELLS[0].name}\.json does not hold figures of a run .* delete it"):
        read_cell(tmp_path, CONFIG, CELLS[0])
