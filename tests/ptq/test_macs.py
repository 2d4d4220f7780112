# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates as they run, against the textbook's numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahcq_plugin.ptq.macs import MacCounter, count_macs

B, N, C = 2, 5, 12
X = torch.randn(B, N, C, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(B, 6, 8, 9, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


class Products(nn.Module):
    def forward(self, x):
        return torch.einsum("bnc,bmc->bnm", x, x), x @ x.mT, torch.addmm(x[0, 0], x[0], x[0].mT @ x[0]), x[0] @ x[0, 0]


CASES = {
    "linear": (nn.Linear(C, 7), X, B * N * C * 7),
    "conv": (nn.Conv2d(6, 4, 3), IMAGE, B * 4 * 6 * 7 * 6 * 9),
    "grouped conv": (nn.Conv2d(6, 9, 3, padding=1, groups=3), IMAGE, B * 9 * 8 * 9 * 2 * 9),
    "strided, dilated conv": (nn.Conv2d(6, 4, (2, 3), stride=2, dilation=2), IMAGE, B * 4 * 3 * 3 * 6 * 6),
    "transposed conv": (nn.ConvTranspose2d(6, 4, 2, stride=2), IMAGE, B * 6 * 8 * 9 * 4 * 4),
    "conv in one dimension": (nn.Conv1d(N, 3, 3), X, B * 3 * (C - 2) * N * 3),
    "fused attention": (Attention(), X, 2 * B * N * N * C),
    "einsum, matmul, addmm, mv": (Products(), X, 2 * B * N * N * C + 2 * N * C * C + N * C),
    "norm, softmax, activation": (nn.Sequential(nn.LayerNorm(C), nn.Softmax(-1), nn.GELU()), X, 0),
    "multi-head attention": (
        nn.TransformerEncoderLayer(C, 2, 20, batch_first=True),
        X,
        B * N * (4 * C * C + 2 * C * 20) + 2 * B * N * N * C,
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("case", CASES)
def test_counts_are_the_textbooks(case, mode):
    module, x, expected = CASES[case]
    with mode(), MacCounter() as counter:
        if case != "multi-head attention" or mode is torch.enable_grad:
            module.eval()(x)
    if case == "multi-head attention":  # its fast path is one operator, unless it is switched off
        counter = count_macs(module.eval(), x, lambda model, item: model(item))
    assert sum(counter.counts.values()) == expected and not counter.hidden


def test_the_numbers_of_a_recurrent_layer_are_unknown_not_zero():
    with torch.no_grad(), MacCounter() as counter:
        nn.LSTM(C, 3)(X)
    assert set().union(*counter.hidden.values()) == {"mkldnn_rnn_layer"} or sum(counter.counts.values()) > 0


def test_modules_outside_of_units_are_told_apart():
    model = nn.Sequential(nn.Linear(C, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    counter = count_macs(model, X, lambda m, item: m(item))
    assert dict(counter.counts) == {("0",): B * N * C * 4, ("1.0",): B * N * 12}
    assert torch.backends.mha.get_fastpath_enabled()
