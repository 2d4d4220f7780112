# SPDX-License-Identifier: Apache-2.0
"""Attention on codes in tiles of queries: the scores of all queries are never in memory together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.graph.relative_positions import Size, relative_terms
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.products import IntegerProduct


@dataclass(frozen=True)
class Positions:
    """Terms of relative positions, added to scores whose keys lie on a grid: ``(scores + rows) + columns``.

    Attributes:
        rows: float32 (b, queries, key rows).
        columns: float32 (b, queries, key columns).
    """

    rows: Tensor
    columns: Tensor

    def check(self, batch: int, queries: int, keys: int) -> None:
        """ValueError unless the terms are those of so many products, queries and keys."""
        (rows, down), (columns, across) = ((t.shape[:2], t.shape[2]) for t in (self.rows, self.columns))
        if rows != (batch, queries) or columns != (batch, queries) or down * across != keys:
            raise ValueError(
                f"relative positions of {tuple(self.rows.shape)} and {tuple(self.columns.shape)} do not fit {batch} "
                f"products of {queries} queries and {keys} keys"
            )

    def add(self, scores: Tensor, batch: slice, queries: slice) -> Tensor:
        """Scores (b, q, keys) of the given products and queries, with their terms."""
        rows, columns = self.rows[batch, queries], self.columns[batch, queries]
        grid = scores.view(*scores.shape[:2], rows.shape[-1], columns.shape[-1])
        return (grid + rows[..., :, None] + columns[..., None, :]).view(scores.shape)


class RelativePositions(nn.Module):
    """The terms that SAM's ``add_decomposed_rel_pos`` adds, for all queries at once: the one product of an encoder's
    unit that stays in floating point, unless its tables are quantized.

    Args:
        function: the model's own ``add_decomposed_rel_pos``; its ``get_rel_pos`` is used.
    """

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self._tables: Callable[[int, int, Tensor], Tensor] = function.__globals__["get_rel_pos"]

    def forward(self, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size: Any, k_size: Any) -> Positions:
        (rows, columns), (key_rows, key_columns) = q_size, k_size
        grid = q.reshape(len(q), rows, columns, q.shape[-1])
        down = torch.einsum("bhwc,hkc->bhwk", grid, self._tables(rows, key_rows, rel_pos_h))
        across = torch.einsum("bhwc,wkc->bhwk", grid, self._tables(columns, key_columns, rel_pos_w))
        return Positions(*(t.reshape(len(q), rows * columns, -1) for t in (down, across)))

    @staticmethod
    @torch.no_grad()
    def can_replace(function: Callable[..., Tensor]) -> bool:
        """Whether a function of that name does just this, tried on small tensors."""
        if "get_rel_pos" not in getattr(function, "__globals__", {}):
            return False
        made = torch.Generator().manual_seed(0)
        scores, q, high, wide = (
            torch.randn(*shape, generator=made) for shape in ((2, 6, 6), (2, 6, 4), (3, 4), (5, 4))
        )
        try:
            wanted = function(scores, q, high, wide, (2, 3), (2, 3))
            terms = RelativePositions(function)(q, high, wide, (2, 3), (2, 3))
        except (TypeError, RuntimeError, ValueError):
            return False
        return torch.equal(terms.add(scores, slice(None), slice(None)), wanted)


class PickedPositions(nn.Module):
    """The terms of relative positions from products with quantized tables."""

    def forward(self, down: Tensor, across: Tensor, q_size: Size, k_size: Size) -> Positions:
        """As ``relative_terms``."""
        return Positions(*relative_terms(down, across, q_size, k_size))


class IntegerAttention(nn.Module):
    """``qk``, scalar factors, relative positions, softmax, codes, ``av``.

    Args:
        qk, av: the products.
        encoder: of the probabilities.
        factors: ``mul`` or ``div`` for each scalar that the scores are multiplied with or divided by, in this order.
    """

    def __init__(self, qk: IntegerProduct, encoder: Encoder, av: IntegerProduct, factors: tuple[str, ...]):
        super().__init__()
        self.qk, self.encoder, self.av, self.factors = qk, encoder, av, factors

    @torch.compiler.disable
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scalars: tuple = (), positions: Positions | None = None
    ) -> Tensor:
        """float32 (..., m, n) of uint8 codes q (..., m, d), k transposed (..., d, t) and v (..., t, n).

        Args:
            scalars: one for each of ``factors``.
            positions: with as many products as all leading axes together.
        """
        if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
            raise ValueError(f"leading axes differ: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expand them")
        shape = (*q.shape[:-1], v.shape[-1])
        q, k, v = (codes.reshape(-1, *codes.shape[-2:]) for codes in (q, k, v))
        if positions is not None:
            positions.check(len(q), q.shape[-2], k.shape[-1])
        return backend_for(q).attention(self, q, k, v, tuple(scalars), positions).view(shape)

    def scaled(self, scores: Tensor, scalars: tuple) -> Tensor:
        """Scores times, or divided by, each scalar in turn."""
        for how, scalar in zip(self.factors, scalars, strict=True):
            scores = scores * scalar if how == "mul" else scores / scalar
        return scores
