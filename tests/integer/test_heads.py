# SPDX-License-Identifier: Apache-2.0
"""Operands with a scale and a zero point for each head, from the quantizer to the product."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ahcq_plugin.export import golden, make_spec
from ahcq_plugin.export.matmul import Unsupported
from ahcq_plugin.export.operands import PerHeadOperand, UniformOperand
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.integer import to_integer, use_backend
from ahcq_plugin.integer.heads import PerHeadEncoder, PerHeadProduct
from ahcq_plugin.integer.model import MATMULS
from ahcq_plugin.integer.products import IntegerProduct
from ahcq_plugin.quantizers import UniformFakeQuantize
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items
from tests.export.test_compare import make_per_head
from tests.integer.cases import BACKENDS
from tests.integer.conftest import quantized_sam

ITEM = make_tiny_items()[1]


@pytest.fixture(scope="module")
def per_head():
    """The small SAM whose q, k and v have scales and zero points of their own for each head."""
    return make_per_head(copy.deepcopy(quantized_sam("rtn", 8)), ITEM)


def products(qmodel, integer):
    """(unit, node) -> product."""
    units = {name: integer.get_submodule(name) for name in prepared_units(qmodel)}
    found = {(name, node): m for name, unit in units.items() for node, m in unit.meta[MATMULS].items()}
    return {key: module for key, module in found.items() if isinstance(module, PerHeadProduct)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_product_equals_the_golden_model(per_head, backend) -> None:
    """With the codes that it gets in the integer model, and the heads of the spec."""
    integer, calls = to_integer(per_head), []
    modules = products(per_head, integer)
    for key, module in modules.items():
        module.register_forward_hook(lambda _, args, out, key=key: calls.append((key, args[:2], out)))
    with torch.no_grad(), use_backend(backend):
        box_forward(integer, ITEM)
    spec = {(unit.name, m.name): m for unit, m in make_spec(per_head, ITEM, box_forward).matmuls()}
    kinds = [(m.kind, m.left.family, m.right.family) for key, m in spec.items() if key in modules]
    assert set(kinds) == {("qk", "per_head", "per_head"), ("av", "uniform", "per_head")} and len(kinds) == 18
    assert len(calls) == len(kinds)
    for key, (left, right), out in calls:
        matmul = spec[key]
        columns = right.numpy()
        columns = np.swapaxes(columns, -1, -2) if matmul.kind == "qk" else columns
        np.testing.assert_array_equal(out.numpy(), golden.run(matmul, left.numpy(), columns).output)


def test_masks_are_those_of_the_fake_quantized_model(per_head) -> None:
    with torch.no_grad():
        for a, b in zip(box_forward(to_integer(per_head), ITEM), box_forward(per_head, ITEM), strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_codes_and_values_are_those_of_the_fake_quantizer(axis) -> None:
    quantizer = UniformFakeQuantize(quant_max=15, ch_axis=axis)
    quantizer.scale.data, quantizer.zero_point = torch.tensor([0.1, 0.3, 0.1, 0.3]), torch.tensor([3, 8, 3, 7]).int()
    quantizer.enable_fake_quant()
    grids = PerHeadOperand(4, quantizer.scale.detach().numpy(), quantizer.zero_point.numpy().astype(np.int64))
    encoder = PerHeadEncoder(grids, axis)
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder(x).long(), quantizer.encode(x).long())
    assert torch.equal(encoder.decode(encoder(x)), quantizer(x).detach())
    assert encoder.labels.tolist() == [0, 2, 0, 1] and encoder.operand().heads == 3
    assert torch.equal(encoder(x - 1, torch.ones(())), encoder(x - 1 + 1))


def test_grids_that_differ_within_a_product_are_refused() -> None:
    one = np.float32(1)
    grids = PerHeadOperand(4, np.array([1, 2], np.float32), np.array([3, 4]))
    product = PerHeadProduct(grids, UniformOperand(4, one, 0))
    codes = torch.ones(2, 3, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    across = product(codes, codes.transpose(1, 2), labels[:, None, None].expand(2, 3, 2))
    assert across[:, 0, 0].tolist() == [-4.0, -12.0]  # 2 * (1 - 3) * 1 and 2 * (1 - 4) * 2
    with pytest.raises(Unsupported, match="differ within a head"):
        product(codes, codes.transpose(1, 2), labels.expand(2, 3, 2))
    with pytest.raises(ValueError, match="3 products cannot be shared out to 2 heads"):
        IntegerProduct(grids, grids)(torch.ones(3, 2, 2, dtype=torch.uint8), torch.ones(3, 2, 2, dtype=torch.uint8))
    none = product(codes[:0], codes.transpose(1, 2)[:0], labels[:, None, None].expand(2, 3, 2)[:0])
    assert none.shape == (0, 3, 3)
