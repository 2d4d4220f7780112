# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ahcq_plugin.functional.dropping import random_mask


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_ones(share, dtype):
    torch.manual_seed(0)
    mask = random_mask(torch.empty(1000, 1001, dtype=dtype), share)
    assert mask.shape == (1000, 1001) and mask.dtype == dtype
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert float(mask.float().mean()) == pytest.approx(share, abs=0.0035)  # 1/512 of rounding, 3 sigma
    assert share not in (0.0, 1.0) or bool((mask == share).all())


def test_neighbours_are_independent():
    torch.manual_seed(1)
    mask = random_mask(torch.empty(2**20), 0.5) - 0.5
    for lag in (1, 2, 4, 7, 8, 64):
        assert abs(float((mask[lag:] * mask[:-lag]).mean())) < 0.001, lag  # 4 sigma


def test_layout_follows_the_tensor():
    """A permuted tensor gets a mask of its own layout, and every element of it is random."""
    torch.manual_seed(2)
    x = torch.empty(4, 64, 8, 32).permute(0, 2, 1, 3)
    mask = random_mask(x, 0.5)
    assert mask.stride() == x.stride() and 0.45 < float(mask.mean()) < 0.55
    assert random_mask(torch.empty(3, 5)[:, ::2], 0.5).shape == (3, 3)
    assert random_mask(torch.empty(0, 4), 0.5).shape == (0, 4)


def test_seeded():
    torch.manual_seed(3)
    first = random_mask(torch.empty(77), 0.3)
    torch.manual_seed(3)
    assert torch.equal(random_mask(torch.empty(77), 0.3), first)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_bad_share(share):
    with pytest.raises(ValueError, match="share"):
        random_mask(torch.empty(2), share)
