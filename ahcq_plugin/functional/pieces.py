# SPDX-License-Identifier: Apache-2.0
"""Large tensors in pieces: on CPUs the time of quantizers goes into memory, unless what they work on stays in cache."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 2**15  # elements of a piece per CPU thread
MOST = 2**30  # on a GPU: torch.dot takes 2^31 - 1 elements at most


def piece_size(x: Tensor) -> int:
    """Elements to work on at a time; on a GPU all of x, up to ``MOST``."""
    return SIZE * max(2, torch.get_num_threads()) if x.device.type == "cpu" else min(max(x.numel(), 1), MOST)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of x fill a stretch of memory, each once: as stored, or with axes permuted."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat_pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a dense x, in the order of memory."""
    return x.as_strided((x.numel(),), (1,)).split(piece_size(x))
