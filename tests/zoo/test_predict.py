# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from ahcq_plugin.zoo.predict import input_image


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_an_image_that_vanishes_when_it_is_resized_is_refused(tiny_sam, shape):
    with pytest.raises(ValueError, match=f"an image of {shape[0]} x {shape[1]} pixels has no row or column left"):
        input_image(tiny_sam, np.zeros((*shape, 3), np.uint8))
    assert min(input_image(tiny_sam, np.zeros((1, 40, 3), np.uint8))[1]) >= 1
