# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ahcq_plugin.support.digest import digest

VALUES = [None, 0, 0.0, "0", b"0", [], [0], [[0]], {"a": 0}, {"a": 1}, {"b": 0}, "a", ["a", "b"], ["ab"], [0, 0]]
VALUES += [
    torch.zeros(2),
    torch.zeros(2, 1),
    torch.zeros(2).half(),
    torch.zeros(2).bfloat16(),
    torch.tensor(0),
    np.zeros(3),
    torch.ones(2),
]


def test_different_values_have_different_hashes_and_equal_ones_equal():
    assert len({digest(value) for value in VALUES}) == len(VALUES)
    assert digest({"a": torch.arange(3), "b": (1, 2)}) == digest({"b": [1, 2], "a": np.arange(3)})


def test_an_object_without_value_is_refused():
    with pytest.raises(TypeError, match="by value"):
        digest(object())
