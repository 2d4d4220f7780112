# SPDX-License-Identifier: Apache-2.0
"""Relative positions of SAM's encoder, from products of queries with whole tables of distances.

SAM picks rows of a table for every pair of a query and a key, and multiplies queries with these. Multiplied with the
whole table first, as a Linear layer does it, the same numbers are picked from the products: a product that can be
quantized like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

Size = tuple[int, int]


def relative_terms(down: Tensor, across: Tensor, q_size: Size, k_size: Size) -> tuple[Tensor, Tensor]:
    """The terms of every query and row, and of every query and column, of keys.

    Args:
        down, across: (b, queries, distances): queries times the tables of vertical and of horizontal distances. A table
            of another length than twice the longer side less 1 is interpolated linearly, as SAM's is.
        q_size, k_size: rows and columns of the queries and of the keys.
    Returns:
        (b, queries, rows of keys) and (b, queries, columns of keys).
    """
    return _picked(down, q_size, k_size[0], 0), _picked(across, q_size, k_size[1], 1)


def add_relative_positions(scores: Tensor, down: Tensor, across: Tensor, q_size: Size, k_size: Size) -> Tensor:
    """``scores`` (b, queries, keys) with the terms of ``relative_terms``, as SAM's ``add_decomposed_rel_pos``."""
    rows, columns = relative_terms(down, across, q_size, k_size)
    grid = scores.view(*scores.shape[:2], *k_size)
    return (grid + rows[..., :, None] + columns[..., None, :]).view(scores.shape)


def multiplies_table(node: fx.Node) -> bool:
    """Whether a node is a product with a table, for ``add_relative_positions``."""
    return any(user.target is add_relative_positions for user in node.users)


def _picked(products: Tensor, q_size: Size, keys: int, axis: int) -> Tensor:
    """(b, queries, keys) of (b, queries, distances), by where queries and keys stand along ``axis``."""
    queries = q_size[axis]
    longest = 2 * max(queries, keys) - 1
    if products.shape[-1] != longest:
        products = F.interpolate(products, size=longest, mode="linear")
    down = torch.arange(queries, device=products.device)[:, None] * max(keys / queries, 1.0)
    across = torch.arange(keys, device=products.device)[None, :] * max(queries / keys, 1.0)
    distances = (down - across + (keys - 1) * max(queries / keys, 1.0)).long()
    grid = products.reshape(len(products), *q_size, longest)
    shape = (1, queries, 1, keys) if axis == 0 else (1, 1, queries, keys)
    return grid.gather(-1, distances.view(shape).expand(*grid.shape[:3], keys)).flatten(1, 2)
