# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ahcq_plugin.ptq.loss import channel_axis, relative_error


def test_units_have_their_channels_where_their_last_layer_puts_them():
    conv, linear = nn.Conv2d(2, 2, 1), nn.Linear(2, 2)
    assert channel_axis(nn.Sequential(conv, nn.ReLU())) == channel_axis(nn.Sequential(linear, conv)) == 1
    assert channel_axis(nn.Sequential(conv, linear)) == channel_axis(linear) == -1


def test_constants_do_not_dilute_the_error():
    target = {"features": torch.tensor([3.0, 4.0]), "positions": [torch.full((9,), 100.0)], "count": torch.tensor(3)}
    out = {"features": torch.tensor([3.0, 3.0]), "positions": [torch.full((9,), 100.0)], "count": torch.tensor(4)}
    assert relative_error(out, target) == pytest.approx(1 / 25)
    assert relative_error(target, target) == 0.0
