# SPDX-License-Identifier: Apache-2.0
"""The kernel behind the table families, on tables that no family makes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional import tables

LARGE = 2**14  # from here on CPUs look levels up by buckets instead of searching them


def random_table(seed: int, count: int, spread: float, offset: float = 0.0) -> tables.Table:
    """``offset`` plus ``count`` levels, 0 first; boundaries span ``spread`` octaves below 1, codes are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    boundaries = torch.exp2(-spread * torch.rand(count - 1, generator=generator, dtype=torch.float64)).sort().values
    middle = (boundaries[1:] + boundaries[:-1]) / 2
    levels = torch.cat([torch.zeros(1).double(), middle, boundaries[-1:] * 1.5])
    codes = torch.randperm(count, generator=generator)
    return tables.make_table(boundaries, levels, codes, levels[-1:], torch.tensor([offset]))


@given(
    st.integers(0, 2**31),
    st.sampled_from([4, 16, 256]),
    st.sampled_from([1e-6, 1e-3, 1.0, 20.0, 120.0]),
    st.sampled_from([0.0, -0.17, 0.5, -700.0, 1e6]),
)
def test_large_tensors_get_the_same_bits_as_small_ones(seed, count, spread, offset):
    table = random_table(seed, count, spread, offset)
    y = torch.exp2(-1.1 * spread * torch.rand(LARGE, generator=torch.Generator().manual_seed(seed)) + 0.1 * spread)
    y = y + offset
    edges = torch.cat([table.boundaries, table.levels])
    for toward in (-math.inf, math.inf):
        edges = torch.cat([edges, torch.nextafter(edges, torch.tensor(toward))])
    y = torch.cat([y, edges, -edges])
    large = tables.fake_quantize(y, table)
    small = torch.cat([tables.fake_quantize(part, table) for part in y.split(LARGE // 2)])
    rank = (y[:, None] >= table.boundaries[None]).sum(1)
    assert torch.equal(large, small) and torch.equal(large, table.levels[rank])
    assert torch.equal(tables.encode(y, table), table.codes[rank])


def test_most_tables_do_take_the_bucket_path():
    assert tables._buckets(random_table(0, 16, 5.0)) is not None
    coinciding = tables.make_table(torch.ones(3).double(), torch.ones(4).double(), torch.arange(4), torch.ones(1))
    assert tables._buckets(coinciding) is None
    assert tables._buckets(random_table(0, 256, 20.0)) is None


@given(st.integers(0, 2**31), st.floats(1e-9, 1e-6))
def test_levels_closer_than_float32_keep_their_codes(seed, step):
    """Steps below the resolution of float32: a rounded boundary must not take a level's own value from it."""
    gaps = torch.rand(15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * step
    levels = torch.cat([torch.zeros(1).double(), 1 + gaps.cumsum(0)])
    table = tables.make_table((levels[1:] + levels[:-1]) / 2, levels, torch.arange(16), levels[-1:])
    assert bool((table.boundaries.diff() >= 0).all())
    assert torch.equal(tables.decode(tables.encode(table.levels, table), table), table.levels)


def test_boundaries_round_to_the_nearest_float32_where_levels_are_apart():
    boundaries = torch.tensor([0.1, 0.3], dtype=torch.float64)
    table = tables.make_table(boundaries, torch.tensor([0.0, 0.2, 0.4]).double(), torch.arange(3), torch.ones(1))
    assert torch.equal(table.boundaries, torch.tensor([0.1, 0.3]))


def test_powers_are_exact():
    assert torch.equal(tables.powers(1, torch.device("cpu")), torch.exp2(-torch.arange(66.0, dtype=torch.float64)))
    eighths = tables.powers(8, torch.device("cpu"))
    assert torch.equal(eighths[8:], eighths[:-8] / 2)
    torch.testing.assert_close(eighths, torch.exp2(-torch.arange(521, dtype=torch.float64) / 8), rtol=1e-15, atol=0)


def test_second_derivatives_are_refused_rather_than_wrong():
    x = torch.rand(4, requires_grad=True)
    out = tables.fake_quantize(x, random_table(0, 4, 1.0))
    (grad,) = torch.autograd.grad((out * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
