# SPDX-License-Identifier: Apache-2.0
"""Graphs beside PyTorch and beside floating point: calls take turns, and the figures are of the graphs given."""

from __future__ import annotations

import copy

from ahcq_plugin import quantize
from ahcq_plugin.export import export_onnx
from ahcq_plugin.studies.inference.timing import in_turn
from ahcq_plugin.studies.onnx_parity import measure
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam


def test_calls_take_turns_and_the_first_round_is_not_timed():
    seen = []
    times = in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert "".join(seen) == "abababab" and len(times) == 2
    assert all(0 <= t.least <= t.median and len(t.clock) == 3 for t in times.values())


def test_figures_of_a_folder(tmp_path):
    """Graphs of another model are far from PyTorch's masks, those of the model itself near."""
    items = make_tiny_items()
    recipe = {"name": "rtn", "w_bits": 4, "a_bits": 8}  # 8 bits of weights take seconds to choose
    qmodel, _ = quantize(make_tiny_sam(), items[:1], recipe, forward=box_forward, progress=False)
    other = copy.deepcopy(qmodel)
    other.mask_decoder.mask_tokens.weight.data.neg_()
    found = []
    for name, model in (("own", qmodel), ("other", other)):
        export_onnx(model, tmp_path / name, style="deploy")
        (row,) = measure(qmodel, make_tiny_sam(), tmp_path / name, items, ["onnxruntime"], 2)
        assert row.masks == 6 and row.boxes == 1 and row.to_dict()["runtime"] == "onnxruntime"
        assert row.encoder_ratio == row.encoder_fp[1] / row.encoder[1] > 0
        found.append(row)
    assert found[0].least_iou > 0.9 > found[1].iou
