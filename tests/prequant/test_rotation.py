# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from ahcq_plugin.prequant.rotation import head_rotation, rotated_rows


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 40, 64, 80])
def test_a_rotation_is_orthogonal_and_spreads_every_channel_over_all(size):
    matrix = head_rotation(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= math.sqrt(2 / size) + 1e-12 or size == 1
    assert torch.equal(matrix, head_rotation(size))


def test_a_power_of_two_has_entries_of_one_size():
    assert torch.allclose(head_rotation(32).abs(), torch.full((32, 32), 32**-0.5, dtype=torch.float64))


def test_what_all_channels_share_does_not_end_up_in_one():
    common = head_rotation(64) @ torch.ones(64, dtype=torch.float64)
    assert float(common.abs().max()) < 0.6 * float(common.norm())


def test_only_the_rows_of_a_head_are_mixed():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 3, generator=generator), torch.randn(10, generator=generator)
    heads, rotation = torch.tensor([[0, 4], [9, 2]]), head_rotation(2)
    new, shift = (rotated_rows(tensor, heads, rotation) for tensor in (weight, bias))
    for head in heads.tolist():
        assert torch.allclose(new[head].double(), rotation @ weight[head].double(), atol=1e-6)
        assert torch.allclose(shift[head].double(), rotation @ bias[head].double(), atol=1e-6)
    others = [1, 3, 5, 6, 7, 8]
    assert torch.equal(new[others], weight[others]) and torch.equal(shift[others], bias[others])
    assert new.dtype == torch.float32 and rotated_rows(weight.half(), heads, rotation).dtype == torch.float16
