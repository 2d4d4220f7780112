# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional.focus import focus_distance, focus_mask


def naive_distance(reference, attention, share):
    """One product, one row, one key at a time."""
    distances = []
    for wanted, found in zip(
        reference.reshape(-1, *reference.shape[-2:]),
        attention.reshape(reference.shape).reshape(-1, *reference.shape[-2:]),
        strict=True,
    ):
        both = either = 0
        for row, other in zip(wanted, found, strict=True):
            least, others_least = share * max(row), share * max(other)
            for a, b in zip(row, other, strict=True):
                in_focus = a > least, b > others_least
                both, either = both + all(in_focus), either + any(in_focus)
        distances.append(1 - both / either)
    return float(np.mean(distances))


def attention(seed, shape=(2, 3, 4, 7), spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).softmax(-1)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_the_distance_is_that_of_a_count_by_hand(one, other, share):
    a, b = attention(one), attention(other)
    wanted = naive_distance(a.numpy(), b.numpy(), np.float32(share))
    assert float(focus_distance(a, b, share)) == pytest.approx(wanted, abs=1e-12)
    assert float(focus_distance(a, a, share)) == 0.0


def test_products_count_alike_and_rows_are_pooled():
    """A product of one key in focus weighs as much as one of many; within a product every key counts once."""
    a = torch.tensor([[[1.0, 0.0, 0.0], [0.4, 0.4, 0.2]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    b = torch.tensor([[[0.0, 1.0, 0.0], [0.4, 0.4, 0.2]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    assert focus_mask(a)[0].tolist() == [[True, False, False], [True, True, False]]
    assert float(focus_distance(a, b)) == pytest.approx(((1 - 2 / 4) + 0) / 2)
    assert float(focus_distance(a[:0], b[:0])) == 0.0


def test_a_row_is_compared_with_its_own_largest():
    """SAQ-SAM's code takes the largest of the row, not of the whole map."""
    assert focus_mask(torch.tensor([[0.9, 0.1], [0.3, 0.7]])).tolist() == [[True, False], [False, True]]
