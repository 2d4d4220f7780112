# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from ahcq_plugin.zoo.predict import input_image, make_batch


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_an_image_that_vanishes_when_it_is_resized_is_refused(tiny_sam, shape):
    with pytest.raises(ValueError, match=f"an image of {shape[0]} x {shape[1]} pixels has no row or column left"):
        input_image(tiny_sam, np.zeros((*shape, 3), np.uint8))
    assert min(input_image(tiny_sam, np.zeros((1, 40, 3), np.uint8))[1]) >= 1


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), "x"])
def test_what_is_no_rgb_image_is_refused(tiny_sam, image):
    with pytest.raises(ValueError, match=r"an image must be \(H, W, 3\) uint8 RGB, got "):
        input_image(tiny_sam, image)


@pytest.mark.parametrize("boxes", [[1, 2, 3], [[1, 2, np.nan, 4]], [[[1, 2, 3, 4]]], [[1, 2, 3, np.inf]]])
def test_what_is_no_box_is_refused(tiny_sam, boxes):
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\) finite numbers"):
        make_batch(tiny_sam, image, boxes)
    assert make_batch(tiny_sam, image, np.zeros((0, 4)))["boxes"].shape == (0, 4)
