# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.zoo.segmentations import problem_of

SQUARE = [2, 1, 7, 1, 7, 4, 2, 4]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_what_pycocotools_writes_is_in_order(height, width, density, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    assert problem_of(rle, (height, width)) is None
    assert problem_of(rle | {"counts": rle["counts"].decode()}, (height, width)) is None
    np.testing.assert_array_equal(masks.decode([masks.from_annotation(rle, mask.shape)], mask.shape)[0], mask)
    assert "the image has" in problem_of(rle, (height + 1, width))
    if len(rle["counts"]) > 1:
        assert problem_of(rle | {"counts": rle["counts"][:-1]}, (height, width)) is not None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[float("nan")] * 8], "no finite number"),
        ([[float("inf"), *SQUARE[1:]]], "no finite number"),
        ([["2", *SQUARE[1:]]], "no finite number"),
        ([[1e9, *SQUARE[1:]]], r"reaches far out of the image, from 2 to 1e\+09 of 8 pixels"),
        ([SQUARE, [-90, -90, 3, 3, 4, 4]], "reaches far out of the image, from -90 to 4 of 8 pixels"),
        ([SQUARE[:5]], "at least three x, y"),
        ([SQUARE, SQUARE[:7]], "at least three x, y"),
        ([SQUARE, "abcdef"], "at least three x, y"),
        ([], "no polygon"),
        ("abc", "neither polygons nor run lengths"),
        ({"size": [6, 8]}, "neither polygons nor run lengths"),
        ({"size": [6, 8], "counts": [1, -2, 49]}, "not all whole numbers from 0 on"),
        ({"size": [6, 8], "counts": [1.0, 47.0]}, "not all whole numbers"),
        ({"size": [6, 8], "counts": [1, 2]}, "add up to 3, the image has 48 pixels"),
        ({"size": [6, 8], "counts": [2**40, 1]}, "the image has 48 pixels"),
        ({"size": [8, 6], "counts": [1, 47]}, r"for size \[8, 6\], the image has \[6, 8\]"),
        ({"size": 48, "counts": [48]}, "for size 48"),
        ({"size": [6, 8], "counts": "\x00\x01"}, "garbage"),
        ({"size": [6, 8], "counts": "oooooooooooooooo"}, "garbage"),
        ({"size": [6, 8], "counts": "é1"}, "garbage"),
        ({"size": [6, 8], "counts": "11"}, "the image has 48 pixels"),
        ({"size": [6, 8], "counts": None}, "not all whole numbers"),
    ],
)
def test_what_pycocotools_must_not_see(segmentation, message):
    with pytest.raises(DataError, match=f"a segmentation cannot be used: .*{message}"):
        masks.from_annotation(segmentation, (6, 8))


def test_polygons_may_reach_a_little_out_of_the_image():
    outside = [[-1.5, -1, 8.5, -1, 8.5, 7, -1.5, 7]]
    assert masks.decode([masks.from_annotation(outside, (6, 8))], (6, 8)).all()
