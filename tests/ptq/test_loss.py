# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ahcq_plugin.ptq.loss import relative_error


def test_constants_do_not_dilute_the_error():
    target = {"features": torch.tensor([3.0, 4.0]), "positions": [torch.full((9,), 100.0)], "count": torch.tensor(3)}
    out = {"features": torch.tensor([3.0, 3.0]), "positions": [torch.full((9,), 100.0)], "count": torch.tensor(4)}
    assert relative_error(out, target) == pytest.approx(1 / 25)
    assert relative_error(target, target) == 0.0
