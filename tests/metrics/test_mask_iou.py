# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ahcq_plugin.metrics.mask_iou import iou_of_areas, mask_iou
from ahcq_plugin.studies.evaluation.iou import mean_iou_by_size
from ahcq_plugin.zoo.items import Item

SHAPES = st.tuples(*[st.integers(0, 3), st.integers(1, 5), st.integers(1, 6)])
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[arrays(bool, shape)] * 2))


def test_iou_of_masks():
    first = np.array([[[1, 1, 0]], [[0, 0, 0]], [[1, 0, 0]]], bool)
    second = np.array([[[0, 1, 1]], [[0, 0, 0]], [[0, 0, 0]]], bool)
    assert mask_iou(first, second).tolist() == [1 / 3, 1.0, 0.0]
    assert mask_iou(first[0], second[0]) == 1 / 3


@settings(max_examples=60)
@given(PAIRS)
def test_iou_is_symmetric_within_0_and_1_and_1_for_equal_masks_alone(pair):
    first, second = pair
    ious = mask_iou(first, second)
    assert ious.shape == first.shape[:-2] and ious.dtype == np.float64
    assert ((ious >= 0) & (ious <= 1)).all()
    np.testing.assert_array_equal(ious, mask_iou(second, first))
    np.testing.assert_array_equal(ious == 1, (first == second).all((1, 2)))
    assert (mask_iou(first, first) == 1).all()


@settings(max_examples=60)
@given(PAIRS)
def test_arrays_tensors_and_areas_agree(pair):
    first, second = pair
    ious = mask_iou(first, second)
    tensors = mask_iou(torch.from_numpy(first), torch.from_numpy(second))
    assert tensors.dtype == torch.float32
    np.testing.assert_array_equal(tensors.numpy(), ious.astype(np.float32))
    for one, other, iou in zip(first, second, ious, strict=True):
        assert iou_of_areas(int((one & other).sum()), int((one | other).sum())) == iou


def test_two_empty_masks_agree_wherever_masks_are_compared():
    empty, full = np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)
    for kind in (lambda mask: mask, torch.from_numpy):
        assert mask_iou(kind(empty), kind(empty)).tolist() == [1]
        assert mask_iou(kind(empty), kind(full)).tolist() == mask_iou(kind(full), kind(empty)).tolist() == [0]
    assert iou_of_areas(0, 0) == 1
    item = Item(np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4), np.float32), list(empty), np.zeros(1))
    assert mean_iou_by_size([item], {"empty": lambda item: item.masks})["empty"]["all"] == 1


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must have one shape, got \(1, 2\) and \(2, 2\)"):
        mask_iou(np.zeros((1, 2), bool), np.zeros((2, 2), bool))
