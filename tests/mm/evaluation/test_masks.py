# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.mm.evaluation import masks


def random_masks(seed, n, height, width):
    return torch.from_numpy(np.random.default_rng(seed).random((n, height, width)) < 0.4)


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))
def test_encode_and_decode_are_inverse(seed, n, height, width):
    some = random_masks(seed, n, height, width)
    np.testing.assert_array_equal(masks.decode(masks.encode(some), (height, width)), some.numpy())


def test_iou_is_the_share_of_common_pixels():
    one, other = random_masks(0, 5, 11, 7), random_masks(1, 5, 11, 7)
    expected = ((one & other).sum((1, 2)) / (one | other).sum((1, 2))).tolist()
    assert masks.pairwise_iou(masks.encode(one), masks.encode(other)) == pytest.approx(expected)


def test_empty_masks_agree_with_each_other_only():
    empty, full = masks.encode(torch.zeros(1, 3, 3).bool()), masks.encode(torch.ones(1, 3, 3).bool())
    assert masks.pairwise_iou(empty * 2, [*empty, *full]) == [1.0, 0.0]


def test_unequal_numbers_of_masks_are_refused():
    with pytest.raises(ValueError, match="got 0 and 1"):
        masks.pairwise_iou([], [{}])


def test_all_forms_of_annotation_give_the_same_mask():
    square = np.zeros((6, 8), bool)
    square[1:4, 2:7] = True
    polygon = [[2, 1, 7, 1, 7, 4, 2, 4]]
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, square.flatten("F"), 2]))).tolist()
    compressed = masks.encode(torch.from_numpy(square)[None])[0]
    for annotation in (polygon, dict(size=[6, 8], counts=runs), compressed):
        decoded = masks.decode([masks.from_annotation(annotation, (6, 8))], (6, 8))[0]
        np.testing.assert_array_equal(decoded, square)
