# SPDX-License-Identifier: Apache-2.0
"""What tuning, refitting and rotating leave is exact everywhere: golden model, integer model, packed file."""

from __future__ import annotations

import pytest

from ahcq_plugin import quantize
from ahcq_plugin.export import load_spec, make_spec, save_spec
from ahcq_plugin.export.compare import compare
from ahcq_plugin.integer import to_integer
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import assert_packed_file_gives_back, make_tiny_items, make_tiny_sam
from tests.integer.cases import BACKENDS
from tests.integer.comparing import differing_matmuls

pytestmark = pytest.mark.slow
ITEMS = make_tiny_items()


@pytest.fixture(scope="module")
def plus():
    """The 64-pixel SAM by ahcq_plus at 4 bits, with few steps, and its report."""
    # LNQ is left out: its search takes longest, and nothing of this touches it
    settings = {"name": "ahcq_plus", "lnq": False, "iterations": 2, "tune_steps": 2, "tune_lr": 1e-2}
    return quantize(make_tiny_sam(), ITEMS[:1], settings, 4, 4, forward=box_forward, progress=False)


def test_the_golden_model_equals_pytorch(plus, tmp_path):
    model, report = plus
    assert report.audit.passed and report.tuning.steps == 2
    save_spec(make_spec(model), tmp_path)
    spec = load_spec(tmp_path)
    assert spec.left_out == ()
    assert "grouped" in {m.left.family for _, m in spec.matmuls() if m.layer.endswith(("attn.proj", "out_proj"))}
    rows, units = compare(model, spec, ITEMS[1:], box_forward)
    assert all(row.outputs for row in rows)
    assert [r for r in rows if r.golden_error > r.golden_limit or r.torch_error > r.torch_limit] == []
    assert sum(unit.differing for unit in units) <= 0.001 * sum(unit.codes for unit in units)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_matmul_on_integers_equals_the_golden_model(plus, backend):
    compared, wrong = differing_matmuls(plus[0], to_integer(plus[0]), ITEMS[1:], box_forward, backend)
    assert compared == 2 * 60 and not wrong, wrong


def test_a_packed_file_gives_it_back(plus, tmp_path):
    assert_packed_file_gives_back(*plus, ITEMS[2:3], tmp_path / "plus.safetensors")
