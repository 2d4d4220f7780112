# SPDX-License-Identifier: Apache-2.0
"""Linear, activation, codes, Linear by blocks of rows: what lies between is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.layers import IntegerLinear

#: Numbers between both layers at a time: 4 MB, which the allocator hands out again without new pages.
BLOCK = 2**20


class IntegerMLP(nn.Module):
    """``second(encoder(activation(first(codes))))`` for uint8 codes (..., k), float32 (..., n).

    Args:
        activations: applied one after another to float32 (rows, hidden); each works on every number by itself.
    """

    def __init__(
        self,
        first: IntegerLinear,
        activations: tuple[Callable[[Tensor], Tensor], ...],
        encoder: Encoder,
        second: IntegerLinear,
    ):
        super().__init__()
        self.first, self.encoder, self.second = first, encoder, second
        self._activations = activations

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        rows = codes.reshape(-1, self.first.k)
        block = max(1, BLOCK // self.first.n) if rows.device.type == "cpu" else max(1, len(rows))
        parts = [self._rows(part) for part in rows.split(block)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*codes.shape[:-1], self.second.n)

    def _rows(self, codes: Tensor) -> Tensor:
        hidden = self.first(codes)
        for activation in self._activations:
            hidden = activation(hidden)
        return self.second(self.encoder(hidden))
