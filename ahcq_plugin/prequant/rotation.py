# SPDX-License-Identifier: Apache-2.0
"""Rotations of attention heads that Q K^T and the output projection do not see (QuaRot, 2404.00456).

With an orthogonal R, (R q)·(R k) = q·k, and W_out R^T R c = W_out c. A rotation mixes a head's channels: none of them
keeps a range of its own, and one scale fits them all better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def head_rotation(size: int) -> Tensor:
    """Orthogonal (size, size), float64, every entry at most sqrt(2 / size): a Hadamard matrix (Sylvester's) where the
    size is a power of two, else its Kronecker product with the cosine transform of the odd factor.

    Columns have signs, drawn once for every size: without, what all channels have in common would end up in one.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    odd = size
    while odd % 2 == 0:
        odd //= 2
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = torch.kron(matrix / math.sqrt(len(matrix)), _cosine_transform(odd))
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return matrix * (1 - 2 * signs)


def _cosine_transform(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), float64 (size, size)."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@torch.no_grad()
def rotated_rows(tensor: Tensor, heads: Tensor, rotation: Tensor) -> Tensor:
    """``tensor`` (channels, ...), a weight or bias, whose rows ``heads[h]`` are rotated among themselves, for every h.

    Args:
        heads: int64 (H, d), each channel at most once.
        rotation: (d, d), applied from the left; computed in float64, rounded to the tensor's dtype once.
    """
    result = tensor.detach().double()
    result[heads] = torch.einsum("ij,hj...->hi...", rotation.to(result.device), result[heads])
    return result.to(tensor.dtype)
