# SPDX-License-Identifier: Apache-2.0
"""The engine of float32: every bit that of numpy in the stated order of sums, in C++ and (slow) as RTL."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.export.operands import SpecError
from ahcq_plugin.hls.engine import rtl, simulate
from ahcq_plugin.hls.engine.config import PES, FloatConfig
from ahcq_plugin.hls.engine.destination import Destination, Strides
from ahcq_plugin.hls.engine.floats import FloatCommand, compile_floats, flushed, left_words, matmul, right_words
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.function_tables import gelu
from ahcq_plugin.hls.rtl.simulate import Stalls

# Rows of at most 96 floats; then two steps of eight rows fit each of the two cells.
SMALL = FloatConfig(cells=2, left_depth=192, right_depth=12)
# (products, m, k, n), with a bias: tails everywhere, several tiles and blocks, a fold a row, one of all
CASES = [
    ((1, 35, 21, 70), True),
    ((1, 101, 70, 130), True),
    ((3, 9, 33, 20), False),
    ((2, 50, 8, 100), False),
    ((1, 1, 1, 1), True),
]


def operands(shape: tuple[int, int, int, int], biased: bool, seed: int = 0) -> list[np.ndarray | None]:
    """Left, right and bias, of magnitudes that differ much."""
    rng, (batch, m, k, n) = np.random.default_rng(seed), shape
    shapes = [(batch, m, k), (batch, n, k), (n,)]
    found = [(rng.standard_normal(s) * 2.0 ** rng.integers(-6, 7, s)).astype(np.float32) for s in shapes]
    return [*found[:2], found[2] if biased else None]


def launched(
    shape: tuple[int, int, int, int], biased: bool, seed: int = 0, **options: object
) -> tuple[FloatCommand, Image, np.ndarray]:
    """A command with its operands in memory, and what it has to give without GELU."""
    image, (left, right, bias) = Image(), operands(shape, biased, seed)
    command = compile_floats(shape, image, SMALL, bias, **options)
    command.write_left(image, left)
    command.write_right(image, right)
    return command, image, matmul(left, right, bias)


def different(command: FloatCommand, image: Image, wanted: np.ndarray) -> int:
    return int((command.read_output(image).view(np.uint32) != wanted.view(np.uint32)).sum())


@given(k=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_sums_is_that_of_one_float_after_the_other(k: int, seed: int) -> None:
    left, right, bias = operands((1, 1, k, 1), True, seed)
    products = [a * b for a, b in zip(left[0, 0], right[0, 0], strict=True)] + [np.float32(0)] * (-k % 8)
    total = None
    for p in np.array(products, np.float32).reshape(-1, 8):
        tree = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
        total = tree if total is None else total + tree
    found = matmul(left, right, bias)
    assert found.item() == total + bias[0]
    exact, size = (
        left[0, 0].astype(float) @ right[0, 0] + bias[0],
        np.abs(left[0, 0] * right[0, 0]).sum() + abs(bias[0]),
    )
    assert abs(found.item() - exact) <= 20 * 2.0**-24 * size


@given(n=st.integers(1, 150), k=st.integers(1, 30))
def test_layouts_hold_every_value_once_and_zeros(n: int, k: int) -> None:
    values = np.arange(1, n * k + 1, dtype=np.float32).reshape(n, k)
    right, left = right_words(values).view(np.float32), left_words(values).view(np.float32)
    assert right.shape == (-(-n // PES), -(-k // 8) * 8, PES) and left.shape == (n, -(-k // 8) * 8)
    assert (left[:, :k] == values).all() and np.count_nonzero(left) == n * k == np.count_nonzero(right)
    column, row = np.indices((n, k))
    assert (right[column // PES, row, column % PES] == values).all()


def test_subnormals_are_zeros_of_their_sign() -> None:
    values = np.array([1e-40, -1e-40, 2.0**-126, -0.0, 1], np.float32)
    assert flushed(values).view(np.uint32).tolist() == [0, 2**31, 0x00800000, 2**31, 0x3F800000]
    tiny = np.full((1, 1, 1), 2.0**-70, np.float32)
    assert matmul(tiny, tiny).item() == 0


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    m=st.integers(1, 70),
    k=st.integers(1, 96),
    n=st.integers(1, 140),
    biased=st.booleans(),
    clocked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matmul_has_the_bits_of_numpy(batch, m, k, n, biased, clocked, seed) -> None:
    command, image, wanted = launched((1 if biased else batch, m, k, n), biased, seed)
    simulate.run(image, [command.descriptor], SMALL, clocked=clocked)
    assert different(command, image, wanted) == 0


def test_gelu_is_that_of_codes() -> None:
    command, image, wanted = launched((1, 20, 12, 70), True, gelu=True)
    simulate.run(image, [command.descriptor], SMALL)
    assert different(command, image, gelu(wanted)) == 0


def chain() -> tuple[list[FloatCommand], Image, np.ndarray]:
    """Queries and values of 20 tokens, Q·K^T of them, A·V on its scores: four commands, no host between them."""
    rng, image, tokens = np.random.default_rng(4), Image(), 20
    x, keys = rng.standard_normal((1, tokens, 32)).astype(np.float32), rng.standard_normal((1, tokens, 24)).astype("f4")
    (wq, wv), (bq, bv) = rng.standard_normal((2, 1, 24, 32)).astype("f4"), rng.standard_normal((2, 24)).astype("f4")

    def rows(n: int) -> Destination:  # as a left operand
        row = -(-n // 8) * 8
        return Destination(Strides(row, 64 * row, 8), tokens * row)

    as_right = Destination(Strides(PES, 64 * PES, 8), -(-tokens // 8) * 8 * PES)  # of one tile: a token is a k
    q = compile_floats((1, tokens, 32, 24), image, SMALL, bq, destination=rows(24))
    v = compile_floats((1, tokens, 32, 24), image, SMALL, bv, destination=as_right, barrier=False)
    for command, weight in ((q, wq), (v, wv)):
        command.write_left(image, x)
        command.write_right(image, weight)
    scores = compile_floats((1, tokens, 24, tokens), image, SMALL, destination=rows(tokens), left=q.descriptor.out)
    scores.write_right(image, keys)
    mixed = compile_floats(
        (1, tokens, tokens, 24), image, SMALL, left=scores.descriptor.out, right=v.descriptor.out
    )  # fmt: skip
    first = matmul(matmul(x, wq, bq), keys)
    return [q, v, scores, mixed], image, matmul(first, matmul(x, wv, bv).swapaxes(1, 2))


def test_results_are_operands_of_the_next_command() -> None:
    commands, image, wanted = chain()
    simulate.run(image, [one.descriptor for one in commands], SMALL)
    assert different(commands[-1], image, wanted) == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"left buffer: beats of eight rows: got 200, at most 192"):
        compile_floats((1, 1, 200, 8), Image(), SMALL)
    with pytest.raises(SpecError, match="right buffer: folds: got 13, at most 12"):
        compile_floats((1, 1, 97, 8), Image(), SMALL)
    with pytest.raises(SpecError, match=r"a bias must have shape \(8,\)"):
        compile_floats((1, 1, 9, 8), Image(), SMALL, np.zeros(9, np.float32))
    with pytest.raises(SpecError, match="one product"):
        compile_floats((2, 1, 9, 8), Image(), SMALL, np.zeros(8, np.float32))
    with pytest.raises(SpecError, match="left_depth"):
        FloatConfig(left_depth=7)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "biased"), CASES)
def test_rtl_has_the_bits_of_numpy_under_stalls_and_resets(shape, biased) -> None:
    for seed, stalls in enumerate([Stalls(), Stalls(0.4, 0, seed=2), Stalls(0, 0.6, seed=5), Stalls(0.2, 0.2, 300, 4)]):
        command, image, wanted = launched(shape, biased, seed)
        rtl.run(image, [command.descriptor], SMALL, stalls, rtl.Memory(latency=1 + 20 * seed))
        assert different(command, image, wanted) == 0


@pytest.mark.slow
def test_rtl_of_gelu_chains_and_subnormals() -> None:
    command, image, wanted = launched((1, 20, 12, 70), True, gelu=True)
    rtl.run(image, [command.descriptor], SMALL)
    assert different(command, image, gelu(wanted)) == 0
    commands, image, wanted = chain()
    rtl.run(image, [one.descriptor for one in commands], SMALL, Stalls(0.3, 0.3, reset_at=900), rtl.Memory(latency=40))
    assert different(commands[-1], image, wanted) == 0
    small = [x * np.float32(2.0**-67) for x in operands((2, 17, 6, 30), False)[:2]]
    image = Image()
    command = compile_floats((2, 17, 6, 30), image, SMALL)
    command.write_left(image, small[0])
    command.write_right(image, small[1])
    rtl.run(image, [command.descriptor], SMALL)
    wanted = matmul(*small)
    assert different(command, image, wanted) == 0 and 0.1 < np.mean(wanted == 0) < 0.99


@pytest.mark.slow
def test_rtl_makes_a_turn_a_cycle() -> None:
    """Where the cells are the limit: 16 rows a cell, twelve folds; a tile's 768 beats come meanwhile."""
    command, image, wanted = launched((1, 32, 96, 640), True)
    turns = 10 * 16 * 12
    cycles = rtl.run(image, [command.descriptor], SMALL).cycles
    assert different(command, image, wanted) == 0
    assert turns <= cycles <= 10 * 768 + 1400  # loads are the limit here: blocks of 32 rows reuse a tile 16 times
