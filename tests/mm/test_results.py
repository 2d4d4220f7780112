# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from ahcq_plugin.mm import results
from ahcq_plugin.mm.results import Cell, cell_key, fill, read_cell, table, update_readme

CONFIG = "mm_configs/sam_tiny_w4a4_yolox_nano_coco.py"
CELLS = (Cell("rtn", 8), Cell("qdrop", 4))
STAGES = ("detect", "fp_eval", "prepare", "calibrate", "reconstruct", "freeze", "audit", "quantized_eval")


class Runs:
    """Stands for ``launch``: notes the calls, writes the figures that a run would write."""

    def __init__(self, fail=()):
        self.calls, self.fail = [], fail

    def __call__(self, config, work_dir, options, resume):
        self.calls.append((options["recipe.name"], options["recipe.w_bits"], resume))
        if options["recipe.name"] in self.fail:
            return 1
        figures = {"AP": 0.1234, "AP50": 0.25, "AP_gt": 0.3, "mIoU": 0.51239, "IoU_fp": 0.9}
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
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, runs) == []
    assert runs.calls == [("rtn", 8, True), ("qdrop", 4, True)]


def test_a_failed_cell_is_a_gap_and_is_tried_again(tmp_path):
    assert fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, Runs(fail=("rtn",))) == ["rtn_w8a8"]
    rows = table(CONFIG, tmp_path / "cells", CELLS).splitlines()
    assert "| rtn | W8A8 | – | – | – | – | – | – | – |" in rows
    assert "| qdrop | W4A4 | 0.123 | 0.250 | 0.300 | 0.5124 | 0.9000 | 10 | 3 |" in rows
    assert "| floating point | 32 | 0.123 | 0.250 | 0.300 | 0.5124 | – | – | – |" in rows
    runs = Runs()
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS, runs)
    assert runs.calls == [("rtn", 8, True)]


def test_stages_of_a_cell(tmp_path):
    assert results.stages_table(CONFIG, tmp_path / "cells", CELLS[1]) == ""
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[1:], Runs())
    rows = results.stages_table(CONFIG, tmp_path / "cells", CELLS[1]).splitlines()
    assert rows[0] == "| stage of qdrop W4A4 | seconds | peak MB |" and "| reconstruct | 2.0 | 3 |" in rows


def test_other_weights_make_figures_stale(tmp_path, monkeypatch):
    fill(CONFIG, tmp_path / "cells", tmp_path / "work", CELLS[:1], Runs())
    assert read_cell(tmp_path / "cells", CONFIG, CELLS[0]) is not None
    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(results, "default_checkpoint", lambda name: other)
    assert read_cell(tmp_path / "cells", CONFIG, CELLS[0]) is None


def test_keys_differ_by_recipe_and_bits():
    keys = {cell_key(CONFIG, cell) for cell in results.CELLS}
    assert len(keys) == len(results.CELLS) == 8


def test_readme_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{results.BEGIN}\nold\n{results.END}\nrest\n")
    update_readme(readme, "| new |")
    update_readme(readme, "| new |")
    assert readme.read_text() == f"# A\n{results.BEGIN}\n| new |\n{results.END}\nrest\n"
    readme.write_text("# A")
    with pytest.raises(ValueError, match="has no <!-- results:begin --> ..."):
        update_readme(readme, "x")
