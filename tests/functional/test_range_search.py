# SPDX-License-Identifier: Apache-2.0
"""The range search is never worse than trying every candidate, and its bounds are bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ahcq_plugin.functional import range_search
from ahcq_plugin.functional.range_search import range_error, search_range
from ahcq_plugin.functional.uniform import decode, encode, qparams_from_range
from ahcq_plugin.studies.reference import range_search as reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def distributions(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """float32 values (C, N) of every kind of distribution that a quantizer may meet."""
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    outlier = normal * 0.01
    outlier[:, 0] = 5
    huge_outlier = normal * 1e-6
    huge_outlier[:, -1] = -5
    return {
        "gaussian": normal * 0.02,
        "laplace": normal.sign() * uniform.clamp_min(1e-7).log(),
        "cauchy": torch.tan(math.pi * (uniform - 0.5)),
        "student": normal / uniform.clamp_min(1e-4).sqrt(),
        "uniform": uniform - 0.3,
        "relu": normal.relu(),
        "negative": -(uniform**2),
        "gelu": torch.nn.functional.gelu(2 * normal),
        "lognormal": (3 * normal).exp(),
        "constant": torch.full(shape, 0.3),
        "negative constant": torch.full(shape, -1.7),
        "zero": torch.zeros(shape),
        "outlier": outlier,
        "huge outlier": huge_outlier,
        "bimodal": normal * 0.1 + (uniform < 0.5) * 2 - 1,
        "two values": (uniform < 0.5) * 0.7 - 0.2,
        "on a grid": (uniform * 15).floor().sub(5) * 0.013,
        "sparse": normal * (uniform < 0.02),
        "denormal": normal * 1e-38,
        "below the smallest scale": normal * 1e-9,
        "at the smallest scale": normal * 4e-8,
        "partly below the smallest scale": normal * 1e-6,
        "large": normal * 1e30,
    }


def random(shape: tuple[int, int], kind: str, seed: int) -> Tensor:
    return distributions(shape, seed)[kind]


KINDS = list(distributions((1, 1), 0))


def errors(x: Tensor, bits: int, p: float = 2.4, steps: int = 100) -> tuple[Tensor, Tensor]:
    """float64 error per channel: ours, and that of the best candidate judged in float64."""
    x64 = x.double()
    ours = search_range(x, bits, p, steps)
    best = reference.search_one_by_one(x64, bits, p, steps)
    return reference.mean_error(x64, *ours, bits, p), reference.mean_error(x64, *best, bits, p)


@pytest.mark.parametrize(
    ("bits", "count"), [(3, 1), (3, 40), (3, 700), (4, 1), (4, 2), (4, 33), (4, 768), (6, 1), (6, 130), (8, 50)]
)
def test_no_channel_is_worse_than_its_best_candidate(bits: int, count: int) -> None:
    x = torch.cat([random((2, count), kind, seed) for seed, kind in enumerate(KINDS)])
    ours, best = errors(x, bits)
    worse = torch.nonzero(ours > best * (1 + 1e-9)).flatten().tolist()
    assert [(KINDS[row // 2], float(ours[row]), float(best[row])) for row in worse] == []


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 90)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 6]),
    p=st.sampled_from([1.0, 1.5, 2.0, 2.4, 3.5]),
    steps=st.integers(1, 12),
)
def test_no_channel_is_worse_for_any_shape_and_power(shape, kind, seed, bits, p, steps) -> None:
    ours, best = errors(random(shape, kind, seed), bits, p, steps)
    assert bool((ours <= best * (1 + 1e-9)).all()), (ours, best)


@settings(max_examples=60)
@given(
    x=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    bits=st.sampled_from([2, 4]),
)
def test_no_channel_is_worse_for_arbitrary_numbers(x: list[list[float]], bits: int) -> None:
    ours, best = errors(torch.tensor(x), bits, steps=10)
    assert bool((ours <= best * (1 + 1e-9)).all()), (ours, best)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [3, 6])
def test_bounds_lie_below_the_errors_and_are_tight(bits: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_search, "_block_size", lambda device: 190)
    kinds = ["gaussian", "cauchy", "relu", "bimodal"]
    x = torch.cat([random((1, 300), kind, seed) for seed, kind in enumerate(kinds)])
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    bounds = range_search._bounds(x, torch.arange(len(x)), span, bits, p, 25)[:, 1:].flatten(1).double()
    exact = torch.stack(
        [reference.mean_error(x.double(), lo, hi, bits, p) for lo, hi in reference.candidates(x, bits, 25)], 1
    )
    exact = exact / span.double()[:, None] ** p
    assert bool((bounds.clamp(min=0) ** (1 / p) <= exact ** (1 / p) + range_search._NORM_SLACK).all())
    assert bool((bounds.amin(1) > 0.8 * exact.amin(1)).all())


@pytest.mark.parametrize("p", [1.0, 1.5, 2.4, 4.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_lines_lie_below_the_error_of_every_single_value(bits: int, p: float) -> None:
    nodes = torch.tensor([0, 0.02, 0.05, 0.1, 0.11, 0.2, 0.3, 0.37, 0.5, 0.65, 0.8, 1], dtype=torch.float64)
    scales = torch.linspace(0.01, 0.9, 60, dtype=torch.float64)
    lines = range_search._lines(nodes, scales, 2**bits - 1, p)
    y = torch.linspace(0, 1, 2001, dtype=torch.float64)
    left = torch.bucketize(y, nodes, right=True).clamp(1, len(nodes) - 1) - 1
    share = (y - nodes[left]) / (nodes[left + 1] - nodes[left])
    line = lines[..., left] * (1 - share) + lines[..., left + 1] * share
    levels = torch.arange(2**bits, dtype=torch.float64)
    distance = (y - levels[:, None] * scales[:, None, None]).abs()  # of every level
    error = distance.cummin(1).values ** p  # of the nearest up to the top level
    assert bool((line <= error + 1e-15).all())


def test_few_candidates_are_evaluated_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([random((2, 768), kind, seed) for seed, kind in enumerate(KINDS)])
    evaluated = []
    errors_of = range_search._errors
    monkeypatch.setattr(
        range_search, "_errors", lambda x, rows, *rest: (evaluated.append(len(rows)), errors_of(x, rows, *rest))[1]
    )
    search_range(x, 4)
    assert sum(evaluated) < 20 * len(x)  # of 1600


def test_blocks_and_groups_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([random((2, 500), kind, seed) for seed, kind in enumerate(KINDS)])
    whole = search_range(x, 4)
    monkeypatch.setattr(range_search, "_block_size", lambda device: 190)
    monkeypatch.setattr(range_search, "_MAX_CHANNELS", 5)
    apart = search_range(x, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))


def test_a_channel_does_not_depend_on_the_others() -> None:
    x = torch.cat([random((2, 64), kind, seed) for seed, kind in enumerate(KINDS)])
    together = torch.stack(search_range(x, 4))
    alone = torch.cat([torch.stack(search_range(row[None], 4)) for row in x], 1)
    assert torch.equal(together, alone)


def test_ranges_contain_zero_and_keep_zero_point_and_scale() -> None:
    x = torch.cat([random((2, 200), kind, seed) for seed, kind in enumerate(KINDS)])
    lo, hi = search_range(x, 4)
    assert lo.dtype == hi.dtype == torch.float32 and lo.shape == hi.shape == (len(x),)
    assert bool((lo <= 0).all()) and bool((hi >= 0).all())
    zero = x.abs().amax(1) == 0
    assert bool((lo[zero] == 0).all()) and bool((hi[zero] == 0).all())


def test_a_constant_channel_is_exact_up_to_rounding() -> None:
    x = torch.tensor([[0.3], [-1.7], [1234.5]])
    assert bool((range_error(x.double(), *search_range(x, 4), 4) ** (1 / 2.4) < 1e-6 * x.abs()[:, 0]).all())


def test_many_values_per_channel() -> None:
    x = random((1, 300_000), "student", 0)
    ours = range_error(x.double(), *search_range(x, 4), 4)
    trials = [range_error(x.double(), lo, hi, 4) for lo, hi in list(reference.candidates(x, 4))[5::37]]
    assert float(ours) <= float(torch.cat(trials).min())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_range_error_is_the_error_of_the_quantizer(bits: int, dtype: torch.dtype, tolerance: float) -> None:
    x = random((3, 70_000), "gaussian", 1)
    lo, hi = torch.tensor([-0.03, 0.01, -0.05]), torch.tensor([0.04, 0.05, -0.02])
    error = range_error(x.to(dtype), lo, hi, bits)
    assert error.dtype == dtype
    torch.testing.assert_close(error, reference.mean_error(x.to(dtype), lo, hi, bits, 2.4), rtol=tolerance, atol=0)
    params = qparams_from_range(lo[:, None], hi[:, None], bits)
    x_hat = decode(encode(x, params, bits), params, bits)
    expected = (x_hat - x).double().abs().pow(2.4).mean(1)
    torch.testing.assert_close(error.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), {}, "finite"),
        (torch.tensor([[1.0, -math.inf]]), {}, "finite"),
        (torch.tensor([[3e38, -3e38]]), {}, "overflow"),
        (torch.ones(3), {}, "shape"),
        (torch.ones(3, 0), {}, "shape"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "float"),
        (torch.ones(3, 2), {"bits": 9}, "bits"),
        (torch.ones(3, 2), {"bits": 1}, "bits"),
        (torch.ones(3, 2), {"p": 0.5}, "`p`"),
        (torch.ones(3, 2), {"steps": 0}, "`steps`"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_range(x, **{"bits": 4} | options)


def test_range_error_names_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        range_error(torch.ones(3, 2), torch.zeros(1), torch.ones(1), 4)


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_searches_agree_on_every_device(device: str) -> None:
    x = torch.cat([random((2, 200), kind, seed) for seed, kind in enumerate(KINDS)])
    first, second = search_range(x.to(device), 4), search_range(x.to(device), 4)
    assert all(torch.equal(a, b) and a.device.type == device for a, b in zip(first, second, strict=True))
    on_cpu = range_error(x.double(), *search_range(x, 4), 4)
    torch.testing.assert_close(range_error(x.double(), *(end.cpu() for end in first), 4), on_cpu, rtol=1e-5, atol=0)
