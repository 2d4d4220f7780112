# SPDX-License-Identifier: Apache-2.0
"""What a backend does, and how it is done in PyTorch where the products are integers already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ahcq_plugin.integer.lanes import Pass

if TYPE_CHECKING:
    from ahcq_plugin.integer.attention import IntegerAttention, Positions
    from ahcq_plugin.integer.encoder import ChannelCoder, Encoder
    from ahcq_plugin.integer.layers import IntegerLinear
    from ahcq_plugin.integer.products import IntegerProduct


#: Scores in memory at a time: 8 MB.
TILE_SCORES = 2**21


class Backend:
    """Codes, matmuls and attention. A subclass gives ``linear_sums`` and ``product_sum``, or whole operations.

    Attributes:
        devices: types of devices that it runs on.
    """

    name = ""
    devices: tuple[str, ...] = ()

    def encode(self, encoder: Encoder, x: Tensor) -> Tensor:
        """uint8 codes of a dense float32 x, in its layout."""
        if len(encoder.boundaries):
            ranks = torch.bucketize(x.contiguous(), encoder.boundaries, right=True, out_int32=True)
            return torch.empty_like(x, dtype=torch.uint8).copy_(encoder.rank_codes[ranks])
        codes = torch.round(x / encoder.scale).add_(encoder.zero_point).clamp_(0, encoder.top)
        return codes.to(torch.uint8)

    def encode_matrices(self, encoder: Encoder, x: Tensor, other: Tensor | None) -> Tensor:
        """uint8 codes, row by row, of a float32 x (b, rows, channels) in any layout, or of its sum with ``other``."""
        return self.encode(encoder, (x if other is None else x + other).contiguous())

    def linear(self, layer: IntegerLinear, codes: Tensor) -> Tensor:
        """float32 (m, n) of uint8 codes (m, k)."""
        if len(layer.permutation):
            codes = codes[:, layer.permutation]
        sums = self.linear_sums(layer, codes)
        return layer.dequantize([acc + layer.starts[:, lane].to(acc.dtype) for lane, acc in enumerate(sums)])

    def linear_codes(self, layer: IntegerLinear, coder: ChannelCoder, codes: Tensor) -> Tensor:
        """uint8 codes (m, n) of what ``linear`` gives."""
        return coder.encode(self.linear(layer, codes))

    def linear_sums(self, layer: IntegerLinear, codes: Tensor) -> list[Tensor]:
        """Of each lane the sums (m, n) of operands times signed weights, int32 where all fits, else int64."""
        raise NotImplementedError

    def product(self, product: IntegerProduct, left: Tensor, right: Tensor) -> Tensor:
        """float32 (b, m, n) of uint8 codes (b, m, k) and (b, k, n)."""
        k = left.shape[-1]
        lane = product.lane(k)
        operands = sum(
            int(factor) * take(table, left).long()
            for factor, table in zip(lane.digits.factors, lane.digits.tables, strict=True)
        )
        total = self.product_sum(product, left, right)
        return product.correct(total, operands.sum(-1), right.long().sum(-2), k)

    def product_sum(self, product: IntegerProduct, left: Tensor, right: Tensor) -> Tensor:
        """int64 (b, m, n): operands of the left codes times right codes."""
        raise NotImplementedError

    def attention(
        self,
        attention: IntegerAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scalars: tuple,
        positions: Positions | None,
    ) -> Tensor:
        """float32 (b, m, n) of uint8 codes (b, m, d), (b, d, t), (b, t, n): scores, softmax, codes, values by tiles of
        queries."""
        (batch, queries, _), keys = q.shape, k.shape[-1]
        rows = max(1, min(queries, TILE_SCORES // max(keys, 1)))
        step = max(1, TILE_SCORES // max(rows * keys, 1))
        out = torch.empty(batch, queries, v.shape[-1], device=q.device)
        for first in range(0, batch, step):
            some = slice(first, first + step)
            for row in range(0, queries, rows):
                tile = slice(row, row + rows)
                scores = attention.scaled(self.product(attention.qk, q[some, tile], k[some]), scalars)
                if positions is not None:
                    scores = positions.add(scores, some, tile)
                codes = self.encode(attention.encoder, torch.softmax(scores, -1))
                out[some, tile] = self.product(attention.av, codes, v[some])
        return out


def take(table, codes: Tensor) -> Tensor:
    """uint8 digits of codes; ``table`` is uint8 (codes,) of numpy, the identity where it counts up from 0."""
    if is_identity(table):
        return codes
    return torch.from_numpy(table).to(codes.device)[codes.int()]


def is_identity(table) -> bool:
    """Whether a digit is the code itself."""
    return bool((table == range(len(table))).all())


def combine(passes: list[Pass], products: list[Tensor], stays: bool) -> Tensor:
    """The sum of all passes, int64; int32 as it is where ``stays``."""
    if stays and len(passes) == 1 and passes[0].factor == 1:
        return products[0]
    total = products[0].long() * passes[0].factor
    for one, product in zip(passes[1:], products[1:], strict=True):
        total.add_(product.long(), alpha=one.factor)
    return total
