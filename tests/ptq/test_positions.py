# SPDX-License-Identifier: Apache-2.0
"""``quantize_positions``: tables of relative positions are weights like others, or are refused by name."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.api import load_quantized
from ahcq_plugin.export import make_spec
from ahcq_plugin.export.onnx_graphs import export_onnx
from ahcq_plugin.graph import UncoveredError, prepared_units
from ahcq_plugin.graph.positions import RELATIVE_POSITIONS
from ahcq_plugin.integer import to_integer
from ahcq_plugin.integer.attention import PickedPositions
from ahcq_plugin.ptq import Recipe, audit, prepare
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS, cover
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.ptq.rotate import rotate_heads
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam
from tests.integer.cases import BACKENDS
from tests.integer.comparing import differing_matmuls
from tests.ptq.standins import HuggingFace, Model
from tests.ptq.test_rotate import forward_in_float64

ITEMS = make_tiny_items()
TABLES = [f"image_encoder.blocks.{block}.attn.rel_pos_{axis}" for block in (0, 1) for axis in "hw"]
RECIPE = {"name": "ahcq", "quantize_positions": True, "acnr_steps": 1, "granularity": "none"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(model, report, file) of the small SAM with 4 bits, audited."""
    folder = tmp_path_factory.mktemp("run")
    made = quantize(make_tiny_sam(), ITEMS[:1], RECIPE, forward=box_forward, progress=False, work_dir=folder)
    return *made, folder / "quantized.pth"


@torch.no_grad()
def test_without_quantization_the_model_is_what_it_was():
    sam = make_tiny_sam()
    wanted, keys = box_forward(sam, ITEMS[1]), set(sam.state_dict())
    prepare(sam, Recipe.from_config(RECIPE), run=lambda sam: box_forward(sam, ITEMS[0]))
    assert keys <= set(sam.state_dict()) and {f"{table}_layer" for table in TABLES} < set(weight_layers(sam))
    for got, target in zip(box_forward(sam, ITEMS[1]), wanted, strict=True):
        torch.testing.assert_close(got, target, rtol=1e-4, atol=1e-5)


def test_tables_are_rounded_and_count_as_integers(result):
    model, report, _ = result
    original = make_tiny_sam()
    assert not any(torch.equal(model.get_parameter(table), original.get_parameter(table)) for table in TABLES)
    usual = cover(prepare(original, Recipe.from_config("rtn")))
    share = {part.name: part for part in usual.parts}[RELATIVE_POSITIONS]
    assert share.kind == IN_UNITS and share.weights == sum(original.get_parameter(t).numel() for t in TABLES)
    assert RELATIVE_POSITIONS not in {part.name for part in report.coverage.parts}
    total = sum(part.weights for part in usual.parts)
    assert report.coverage.share(INTEGERS) == pytest.approx(usual.share(INTEGERS) + share.weights / total)
    assert report.coverage.share(IN_UNITS, "macs") == 0.0


def test_a_table_off_its_grid_fails_the_audit(result):
    model = copy.deepcopy(result[0])
    assert audit(model, ITEMS[0], box_forward).passed
    model.get_parameter(TABLES[0]).data[0] += 1e-3
    report = audit(model, ITEMS[0], box_forward)
    assert not report.passed and any(f"{TABLES[0]}_layer" in problem for problem in report.problems)


def test_every_product_is_in_the_spec_and_on_integers(result):
    model, _, _ = result
    spec = make_spec(model, ITEMS[1], box_forward)
    assert not spec.left_out and {f"{t}_layer" for t in TABLES} < {f"{u.name}.{m.layer}" for u, m in spec.matmuls()}
    integer = to_integer(model)
    compared, wrong = differing_matmuls(model, integer, ITEMS[1:2], box_forward, BACKENDS[0])
    assert compared == 60 + len(TABLES) and not wrong, wrong
    assert sum(isinstance(module, PickedPositions) for module in integer.modules()) == 2
    for got, target in zip(box_forward(integer, ITEMS[1]), box_forward(model, ITEMS[1]), strict=True):
        assert float((got - target).norm()) < 0.01 * float(target.norm())  # a code on a boundary may flip


def test_a_file_gives_the_same_bits(result):
    model, _, file = result
    loaded = load_quantized(file, lambda _: make_tiny_sam())
    wanted = box_forward(model, ITEMS[1])
    assert all(map(torch.equal, box_forward(loaded, ITEMS[1]), wanted))


@torch.no_grad()
def test_onnx_computes_the_same(result, tmp_path):
    unit = prepared_units(result[0])["image_encoder.blocks.0"]
    x = torch.randn(1, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    export_onnx(unit, tmp_path / "unit.onnx", (x,))
    session = onnxruntime.InferenceSession(str(tmp_path / "unit.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert float((torch.from_numpy(got) - unit(x)).norm()) < 0.02 * float(unit(x).norm())


@torch.no_grad()
def test_heads_are_rotated_with_their_tables():
    sam = make_tiny_sam()
    sam.image_encoder.double(), sam.mask_decoder.double()
    recipe = Recipe.from_config("qdrop", quantize_positions=True)
    prepare(sam, recipe, run=lambda sam: forward_in_float64(sam, ITEMS[0]))
    wanted, before = forward_in_float64(sam, ITEMS[1]), copy.deepcopy(sam.state_dict())
    assert len(rotate_heads(sam, ITEMS[0], forward_in_float64)) == 2 * (2 + 2 * 3 + 1)
    assert not any(torch.equal(sam.get_parameter(table), before[table]) for table in TABLES)
    for got, target in zip(forward_in_float64(sam, ITEMS[1]), wanted, strict=True):
        torch.testing.assert_close(got, target, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_tables_of_another_length_are_interpolated():
    """A checkpoint of another image size: what SAM interpolates before the product, we do behind it."""
    sam = make_tiny_sam()
    attention = sam.image_encoder.blocks[1].attn
    attention.rel_pos_h = nn.Parameter(torch.randn(9, attention.rel_pos_h.shape[1]))
    wanted = box_forward(sam, ITEMS[0])
    prepare(sam, Recipe.from_config(RECIPE), run=lambda sam: box_forward(sam, ITEMS[0]))
    for got, target in zip(box_forward(sam, ITEMS[0]), wanted, strict=True):
        torch.testing.assert_close(got, target, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_quantized_is_named():
    item = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = Recipe.from_config("rtn", quantize_positions=True)
    message = (
        r"can quantize what `add_decomposed_rel_pos` .* but not .*einsum: relative positions \(at .*standins.py:\d+"
    )
    with pytest.raises(UncoveredError, match=message):
        prepare(HuggingFace(), recipe, run=lambda model: model(item))
    with pytest.raises(ValueError, match=r"none of the \d+ units multiplies queries with tables of relative positions"):
        prepare(Model(), recipe)
