# SPDX-License-Identifier: Apache-2.0
"""Codes that the engine writes: quantizers as thresholds, GELU, and the places where the next matmul reads them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import Matmul, SpecError, UniformOperand, WeightOperand, golden
from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.thresholds import float_keys, key_floats, rank_keys
from ahcq_plugin.hls.engine import layouts, simulate
from ahcq_plugin.hls.engine.compile import columns_of, compile_matmul
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.destination import Segment, floats, head_operands, left_rows, merged_heads, shorts
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.function_tables import gelu
from ahcq_plugin.hls.vectors import Vectors, make_vectors, quantizer_values

SMALL = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48)
ACTIVATIONS = {"": lambda x: x, "gelu": gelu, "relu": lambda x: np.maximum(x, np.float32(0))}
FLOATS = st.floats(width=32, allow_nan=False)


@given(values=st.lists(FLOATS, min_size=2, max_size=2))
def test_keys_are_ordered_as_floats(values: list[float]) -> None:
    a, b = np.array(values, np.float32)
    keys = float_keys(np.array([a, b]))
    assert (keys[0] < keys[1]) == (a < b) and (keys[0] == keys[1]) == (a == b)
    assert (key_floats(keys) == [a, b]).all()


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(family=st.sampled_from(["uniform", "hluq", "table"]), bits=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
def test_thresholds_are_the_quantizer(cases, family: str, bits: int, seed: int) -> None:
    operand = cases.specs.make_left(family, bits, 4, np.random.default_rng(seed))
    keys, codes = rank_keys(operand)
    edges = key_floats(np.concatenate([keys - 1, keys, keys + 1]).clip(-0x7F800000, 0x7F800000))
    values = np.concatenate([edges, quantizer_values(operand, 20, 20, seed).ravel()])
    ranks = (float_keys(values)[:, None] >= keys).sum(1)
    assert (codes[ranks] == encode(operand, values)).all()


@pytest.mark.parametrize("scale", [1e-38, 3e38])
@pytest.mark.parametrize("zero_point", [0, 15])
def test_thresholds_of_extreme_scales(scale: float, zero_point: int) -> None:
    operand = UniformOperand(4, np.float32(scale), zero_point)
    values = np.array([-3e38, -1e38, -1e-38, -0.0, 0.0, 1e-45, 1e-38, 1e38, 3.4e38], np.float32)
    keys, codes = rank_keys(operand)
    assert (codes[(float_keys(values)[:, None] >= keys).sum(1)] == encode(operand, values)).all()


def passing(values: np.ndarray):
    """A matmul whose outputs are its biases: all weights are their zero points."""
    n = len(values)
    weight = WeightOperand(4, np.full((n, 8), 5), np.ones(n, np.float32), np.full(n, 5))
    return Matmul("pass", "linear", "fc", 1, 3, 8, n, UniformOperand(4, np.float32(1), 3), weight, values, 12)


@pytest.mark.parametrize("activation", ["", "gelu", "relu"])
@pytest.mark.parametrize("family", ["uniform", "hluq", "table"])
def test_codes_of_ties_far_values_and_neighbours(cases, launch, family: str, activation: str) -> None:
    for bits in (2, 4, 5, 8):
        operand = cases.specs.make_left(family, bits, 4, np.random.default_rng(bits))
        values = quantizer_values(operand, 40, 33, bits).ravel() + np.float32(0)  # a sum has no negative zero
        matmul = passing(values)
        image = Image()
        destination = left_rows(3, len(values), operand, activation)
        command = launch(matmul, Vectors(np.ones((1, 3, 8), np.int64)), SMALL, image, destination=destination)
        simulate.run(image, [command.descriptor], SMALL)
        words = image.read(command.descriptor.out, destination.words).reshape(3, -1)
        slots = np.pad(np.arange(len(values)), (0, -len(values) % 8), constant_values=-1)
        wanted = encode(operand, ACTIVATIONS[activation](values))
        assert (layouts.left_codes(words, slots, bits) == wanted).all(), (family, bits)


def test_gelu_is_gelu() -> None:
    x = np.linspace(-7, 7, 100001, dtype=np.float32)
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    assert np.abs(gelu(x) - exact).max() < 5e-7
    assert (gelu(np.array([0, -np.inf, np.inf, 1e30], np.float32)) == np.array([0, 0, np.inf, 1e30], np.float32)).all()


@pytest.mark.parametrize("bits", [4, 6])
def test_an_mlp_is_one_program(cases, launch, bits: int) -> None:
    """lin1, GELU, the quantizer of lin2, lin2: codes never leave the engine's memory."""
    rng = np.random.default_rng(bits)
    first = cases.make_matmul("linear", "grouped", bits, 4, 40, 150, rng)
    second = cases.make_matmul("linear", "hluq", bits, 4, 150, 70, rng)
    vectors, image = make_vectors(first, 1, 45, 1), Image()
    one = launch(first, vectors, SMALL, image, destination=left_rows(45, 150, second.left, activation="gelu"))
    two = compile_matmul(second, image, SMALL, rows=45, left=one.descriptor.out)
    simulate.run(image, [one.descriptor, two.descriptor], SMALL)
    codes = encode(second.left, gelu(golden.run(first, vectors.left).output))
    wanted = golden.run(second, codes).output
    assert len(np.unique(codes)) > 4
    assert (two.read_output(image).view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize(("bits", "heads_differ"), [(4, True), (7, False)])
def test_projections_and_attention_are_one_program(cases, launch, bits: int, heads_differ: bool) -> None:
    """q and k of windows go straight to Q.K^T; A.V goes straight to the rows of the next layer."""
    windows, tokens, heads, size = 3, 70, 3, 16
    rng, family = np.random.default_rng(bits), "per_head" if heads_differ else "uniform"
    joint = cases.make_matmul("linear", "grouped", 4, 4, 24, 2 * heads * size, rng)
    product = cases.make_matmul("qk", family, bits, bits, size, tokens, rng, family)
    vectors, image = make_vectors(joint, 1, windows * tokens, 2), Image()
    parts = []
    for index, (side, operand) in enumerate([("left", product.left), ("right", product.right)]):
        segment = Segment(side, single(operand, heads))
        matmul = columns_of(joint, index * heads * size, (index + 1) * heads * size)
        to = head_operands(windows * tokens, tokens, heads * size, heads, segment)
        parts.append(launch(matmul, vectors, SMALL, image, destination=to))
    last = compile_matmul(
        product,
        image,
        SMALL,
        rows=tokens,
        batch=windows * heads,
        left=parts[0].descriptor.out,
        right=parts[1].descriptor.out,
    )
    simulate.run(image, [*(part.descriptor for part in parts), last.descriptor], SMALL)
    out = golden.run(joint, vectors.left).output.reshape(windows, tokens, 2, heads, size).transpose(2, 0, 3, 1, 4)
    codes = [
        encode(o, part.copy()).reshape(-1, tokens, size)
        for o, part in zip((product.left, product.right), out, strict=True)
    ]
    wanted = golden.run(product, *codes).output
    assert (last.read_output(image).view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 80), (6, 24)])
def test_values_go_straight_to_the_attention(cases, launch, bits: int, size: int) -> None:
    windows, tokens, heads = 2, 37, 3
    rng = np.random.default_rng(size)
    projection = cases.make_matmul("linear", "uniform", 4, 4, 24, heads * size, rng)
    product = cases.make_matmul("av", "uniform", 4, bits, tokens, size, rng)
    vectors, image = make_vectors(projection, 1, windows * tokens, 2), Image()
    to = head_operands(windows * tokens, tokens, heads * size, heads, Segment("values", (product.right,)))
    one = launch(projection, vectors, SMALL, image, destination=to)
    left = make_vectors(product, windows * heads, tokens, 3).left
    two = compile_matmul(product, image, SMALL, rows=tokens, batch=windows * heads, right=one.descriptor.out)
    two.write_left(image, left)
    simulate.run(image, [one.descriptor, two.descriptor], SMALL)
    out = golden.run(projection, vectors.left).output.reshape(windows, tokens, heads, size).swapaxes(1, 2)
    codes = encode(product.right, out.copy()).reshape(-1, tokens, size)
    assert len(np.unique(codes)) > 4
    wanted = golden.run(product, left, codes).output
    assert (two.read_output(image).view(np.uint32) == wanted.view(np.uint32)).all()


def single(operand, heads: int) -> tuple[UniformOperand, ...]:
    if isinstance(operand, UniformOperand):
        return (operand,)
    pairs = zip(operand.scales, operand.zero_points, strict=True)
    return tuple(UniformOperand(operand.bits, scale, int(zero)) for scale, zero in pairs)


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_are_merged_for_the_next_layer(cases, launch, bits: int) -> None:
    windows, heads, tokens, size = 2, 3, 21, 24
    rng = np.random.default_rng(bits)
    product = cases.make_matmul("av", "table", 4, 4, 30, size, rng, "per_head")
    vectors, image = make_vectors(product, windows * heads, tokens, 3), Image()
    out = golden.run(product, vectors.left, vectors.right).output
    next_one = UniformOperand(bits, np.float32(out.std() / 2 ** (bits - 2)), 2**bits // 2)
    to = merged_heads(windows, heads, tokens, size, next_one)
    command = launch(product, vectors, SMALL, image, destination=to)
    simulate.run(image, [command.descriptor], SMALL)
    words = image.read(command.descriptor.out, to.words).reshape(windows * tokens, -1)
    got = layouts.left_codes(words, np.arange(heads * size), bits)
    wanted = encode(next_one, out.reshape(windows, heads, tokens, size).swapaxes(1, 2).reshape(-1, heads * size))
    assert len(np.unique(got)) > 4 and (got == wanted).all()


def test_floats_go_where_the_strides_say(cases, launch) -> None:
    """A destination of one's own: products side by side in rows."""
    product = cases.make_matmul("qk", "uniform", 4, 4, 16, 24, np.random.default_rng(0))
    vectors, image = make_vectors(product, 4, 5, 3), Image()
    plain = floats(4, 5, 24)
    strides = dataclasses.replace(plain.strides, row=4 * 24, row64=64 * 96, head=24, product=24)
    command = launch(product, vectors, SMALL, image, destination=dataclasses.replace(plain, strides=strides, words=480))
    simulate.run(image, [command.descriptor], SMALL)
    got = image.read(command.descriptor.out, 480).view(np.float32).reshape(5, 4, 24).swapaxes(0, 1)
    assert (got == golden.run(product, vectors.left, vectors.right).output).all()


@pytest.mark.parametrize("family", ["uniform", "per_head"])
def test_scores_of_16_bits_are_the_same_floats(cases, launch, family: str) -> None:
    product = cases.make_matmul("qk", family, 4, 4, 32, 70, np.random.default_rng(4), family)
    assert product.accumulator_bits <= 16
    vectors, image = make_vectors(product, 3, 70, 3), Image()
    command = launch(product, vectors, SMALL, image, destination=shorts(3, 70, 70, 3 if family == "per_head" else 1))
    run = simulate.run(image, [command.descriptor], SMALL)
    wanted = golden.run(product, vectors.left, vectors.right).output
    assert (command.read_output(image).view(np.uint32) == wanted.view(np.uint32)).all()
    wide, other = dataclasses.replace(product, accumulator_bits=17), Image()
    with pytest.raises(SpecError, match="written with 16"):
        launch(wide, vectors, SMALL, other, destination=shorts(3, 70, 70))
    plain = launch(product, vectors, SMALL, other)
    assert run.ddr_bytes < 0.8 * simulate.run(other, [plain.descriptor], SMALL).ddr_bytes
