# SPDX-License-Identifier: Apache-2.0
"""Every matmul of the integer model equals the golden model, bit for bit, on every backend that works here."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ahcq_plugin.export import golden
from ahcq_plugin.export.interpret import cut_patches
from ahcq_plugin.export.matmul import Patches, accumulator_range, heads_of, signed_bits
from ahcq_plugin.export.operands import UniformOperand
from ahcq_plugin.integer import use_backend
from ahcq_plugin.integer.digits import INT32_TOP, split
from ahcq_plugin.integer.lanes import make_lanes, product_count
from ahcq_plugin.integer.layers import IntegerConv2d, IntegerGroupedConv2d, IntegerLinear
from ahcq_plugin.integer.packed import PackedWeight, unpack_codes
from ahcq_plugin.integer.products import IntegerProduct
from tests.export.specs import LEFT_FAMILIES, PRODUCTS, make_left, make_linear, make_product, make_scale, make_weight
from tests.integer.cases import BACKENDS, agq_operand, lnq_operand

SIZES = st.integers(1, 70)


def linear_of(matmul, keep: bool = True) -> IntegerLinear:
    return IntegerLinear(matmul.left, matmul.right, matmul.bias, keep)


def assert_linear(matmul, codes: np.ndarray, backend: str, keep: bool = True) -> None:
    with use_backend(backend):
        out = linear_of(matmul, keep)(torch.from_numpy(codes).to(torch.uint8))
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), golden.run(matmul, codes).output)


def assert_product(matmul, left: np.ndarray, right: np.ndarray, backend: str) -> None:
    """``right`` as golden takes it: (b, n, k) of qk, (b, k, n) of av."""
    columns = np.swapaxes(right, -1, -2) if matmul.kind == "qk" else right
    with use_backend(backend):
        out = IntegerProduct(matmul.left, matmul.right)(
            torch.from_numpy(left).to(torch.uint8), torch.from_numpy(columns.copy()).to(torch.uint8)
        )
    np.testing.assert_array_equal(out.numpy(), golden.run(matmul, left, right).output)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=60)
@given(
    family=st.sampled_from(LEFT_FAMILIES),
    bits=st.integers(2, 8),
    w_bits=st.integers(2, 8),
    m=st.integers(0, 40),
    k=SIZES,
    n=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    extreme=st.booleans(),
    keep=st.booleans(),
)
def test_linear(backend, family, bits, w_bits, m, k, n, seed, extreme, keep) -> None:
    rng = np.random.default_rng(seed)
    matmul = make_linear(family, bits, k, n, rng, w_bits)
    codes = rng.choice([0, 2**bits - 1], (m, k)) if extreme else rng.integers(0, 2**bits, (m, k))
    assert_linear(matmul, codes, backend, keep)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=60)
@given(
    families=st.sampled_from([*PRODUCTS, ("av", "uniform", "uniform")]),
    bits=st.integers(2, 8),
    batch=st.integers(0, 4),
    m=st.integers(1, 20),
    k=SIZES,
    n=SIZES,
    seed=st.integers(0, 2**31),
    extreme=st.booleans(),
)
def test_product(backend, families, bits, batch, m, k, n, seed, extreme) -> None:
    rng = np.random.default_rng(seed)
    kind, left_family, right_family = families
    matmul = make_product(kind, left_family, bits, k, n, rng, right_family)
    batch *= heads_of(matmul.left, matmul.right)  # products of all heads
    shapes = (batch, m, k), ((batch, n, k) if kind == "qk" else (batch, k, n))
    draw = (lambda s: rng.choice([0, 2**bits - 1], s)) if extreme else (lambda s: rng.integers(0, 2**bits, s))
    assert_product(matmul, draw(shapes[0]), draw(shapes[1]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "operand", [lnq_operand(4), lnq_operand(8), agq_operand(4, 1), agq_operand(4, 4), agq_operand(8, 4)]
)
def test_real_tables_over_many_tokens(backend, operand) -> None:
    """LNQ reaches 2^16 and AGQ 2^30: over 4,096 tokens of the largest codes no int32 holds the sum."""
    rng = np.random.default_rng(0)
    right = UniformOperand(8, make_scale(rng), 77)
    width = signed_bits(*accumulator_range(operand, right, 4096))
    matmul = dataclasses.replace(
        make_product("av", "table", 8, 4096, 5, rng), left=operand, right=right, accumulator_bits=width
    )
    largest = int(operand.table.argmax())
    codes = np.stack([np.full((3, 4096), largest), rng.integers(0, 2**operand.bits, (3, 4096))])
    values = np.stack([np.full((4096, 5), 255), rng.integers(0, 256, (4096, 5))])
    assert_product(matmul, codes, values, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lane_longer_than_int32_allows_is_split(backend) -> None:
    rng = np.random.default_rng(1)
    matmul = make_linear("uniform", 8, 70_000, 2, rng)
    layer = linear_of(matmul)
    assert len(layer.passes(layer.lanes[0])) > 1
    assert_linear(matmul, np.full((2, 70_000), 255), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=25)
@given(
    channels=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
def test_convolution(backend, channels, kernel, stride, padding, bits, seed) -> None:
    rng = np.random.default_rng(seed)
    patches = Patches(channels, kernel, stride, padding)
    k = channels * kernel[0] * kernel[1]
    matmul = dataclasses.replace(make_linear("uniform", bits, k, 6, rng), patches=patches)
    codes = rng.integers(0, 2**bits, (2, channels, 5, 4))
    wanted = golden.run(matmul, cut_patches(codes, patches, matmul.left.zero_point)).output
    with use_backend(backend):
        out = IntegerConv2d(matmul.left, matmul.right, matmul.bias, patches)(torch.from_numpy(codes).to(torch.uint8))
    np.testing.assert_array_equal(out.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), wanted)


@hypothesis_settings(max_examples=25)
@given(groups=st.integers(1, 4), per_group=st.integers(1, 3), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_convolution_with_groups_is_one_matmul_a_group(groups, per_group, bits, seed) -> None:
    rng = np.random.default_rng(seed)
    patches, k = Patches(2, (3, 3), (1, 2), (1, 1)), 18
    left = make_left("uniform", bits, k, rng)
    matmuls = [
        dataclasses.replace(
            make_linear("uniform", bits, k, per_group, rng), left=left, patches=patches, accumulator_bits=40
        )
        for _ in range(groups)
    ]
    codes = rng.integers(0, 2**bits, (2, 2 * groups, 5, 6))
    parts = {
        name: np.concatenate([getattr(m.right, name) for m in matmuls]) for name in ("codes", "scales", "zero_points")
    }
    whole = dataclasses.replace(patches, channels=2 * groups, groups=groups)
    bias = np.concatenate([m.bias for m in matmuls])
    conv = IntegerGroupedConv2d(left, dataclasses.replace(matmuls[0].right, **parts), bias, whole)
    out = conv(torch.from_numpy(codes).to(torch.uint8)).permute(0, 2, 3, 1)
    for group, matmul in enumerate(matmuls):
        rows = cut_patches(codes[:, 2 * group : 2 * group + 2], patches, left.zero_point)
        part = out[..., group * per_group : (group + 1) * per_group].reshape(-1, per_group)
        np.testing.assert_array_equal(part.numpy(), golden.run(matmul, rows).output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_and_zero_points_of_heads(backend) -> None:
    """With vectors over heads every product is that of its head."""
    rng = np.random.default_rng(5)
    matmuls = [make_product("qk", "uniform", 6, 8, 7, rng) for _ in range(3)]
    product = IntegerProduct(matmuls[0].left, matmuls[0].right)
    singles = [IntegerProduct(m.left, m.right) for m in matmuls]
    for name in ("left_zero", "right_zero", "scale"):
        setattr(product, name, torch.cat([getattr(single, name) for single in singles]))
    left, right = rng.integers(0, 64, (2, 3, 5, 8)), rng.integers(0, 64, (2, 3, 8, 7))
    with use_backend(backend):
        out = product(*(torch.from_numpy(t).to(torch.uint8) for t in (left, right)))
    for head, matmul in enumerate(matmuls):
        wanted = golden.run(matmul, left[:, head], np.swapaxes(right[:, head], -1, -2)).output
        np.testing.assert_array_equal(out[:, head].numpy(), wanted)


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31), most=st.sampled_from([1, 255, 256, 2**16, 2**30]))
def test_digits_are_exact_and_fit(bits, seed, most) -> None:
    values = np.random.default_rng(seed).integers(0, most + 1, 2**bits)
    digits = split(values)
    total = (digits.factors[:, None] * digits.tables.astype(np.int64)).sum(0)
    np.testing.assert_array_equal(total, values)
    assert digits.tables.dtype == np.uint8 and len(digits) <= -(-int(most).bit_length() // 8)


@given(family=st.sampled_from(LEFT_FAMILIES), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_every_pass_is_proved_to_fit(family, bits, seed) -> None:
    left = make_left(family, bits, 64, np.random.default_rng(seed))
    for lane in make_lanes(left, 64):
        passes = list(lane.passes(255))
        assert all((p.end - p.begin) * p.top * 255 <= INT32_TOP for p in passes)
        assert sum(p.end - p.begin for p in passes) == (lane.end - lane.begin) * len(lane.digits)


def test_numbers_of_products() -> None:
    """Those of the table in docs/integer.md."""
    rng = np.random.default_rng(0)
    wanted = {lnq_operand(4): 2, agq_operand(4, 1): 2, agq_operand(4, 4): 4, agq_operand(8, 4): 4}
    wanted |= {make_left(family, 8, 64, rng): 1 for family in ("uniform", "grouped")}
    for operand, count in wanted.items():
        assert product_count(operand, 64, 128) == count
    assert product_count(lnq_operand(8), 64, 128) in (2, 3)


@given(bits=st.integers(2, 8), n=st.integers(1, 9), k=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_packed_weights_come_back(bits, n, k, seed) -> None:
    weight = make_weight(bits, n, k, np.random.default_rng(seed))
    packed = PackedWeight(weight, keep=True)
    np.testing.assert_array_equal(packed.codes().numpy(), weight.codes)
    np.testing.assert_array_equal(packed.signed().numpy(), weight.signed())
    assert packed.packed.numel() == -(-n * k * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed.packed, bits, n * k).numpy(), weight.codes.reshape(-1))


def test_a_processor_whose_sums_saturate_is_noticed() -> None:
    """oneDNN held to AVX2 adds pairs of products in 16 bits; whatever it then does, results stay right."""
    code = (
        "import numpy as np, torch\n"
        "from tests.integer.test_matmuls import assert_linear, make_linear\n"
        "from ahcq_plugin.integer.backends import BACKENDS, _usable\n"
        "for name in BACKENDS:\n"
        "    try: _usable(name, 'cpu')\n"
        "    except RuntimeError as reason: print(name, reason); continue\n"
        "    m = make_linear('uniform', 8, 64, 8, np.random.default_rng(0))\n"
        "    for codes in (np.full((33, 64), 255), np.zeros((33, 64), np.int64)): assert_linear(m, codes, name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
