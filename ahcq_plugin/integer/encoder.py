# SPDX-License-Identifier: Apache-2.0
"""From floats to codes and back: the modules that stand where fake quantizers stood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.operands import (
    Activation,
    GroupedOperand,
    HLUQOperand,
    TableOperand,
    UniformOperand,
    top,
)
from ahcq_plugin.functional.pieces import is_dense
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.forms import Forms


class Encoder(Forms):
    """Codes of a float tensor, uint8, in the layout of the input; the same codes as ``encode`` of its family.

    ``uniform``: ``clamp(round(x / scale) + zero_point, 0, top)`` in float32, division by division, half to even; one
    scale, or one for each channel of the last axis (CAG). ``ranked``: the number of boundaries <= x is the rank,
    ``rank_codes`` has its code. NaN has no code: its result is any.

    Attributes:
        bits: of the codes.
        name: of the tensor, as the fake quantizer had it.
        rows: Linear layers alone read the codes; they then lie row by row, whatever the layout of the input.
        scale, zero_point: float32 (1,) or (channels,); of an encoder by rank empty.
        boundaries, rank_codes: float32 (2^bits - 1,) and uint8 (2^bits,); of a uniform encoder empty.
        levels: float32 (2^bits,), what ``decode`` gives; empty for uniform encoders.
    """

    def __init__(self, operand: Activation, levels: Tensor | None = None, name: str = ""):
        super().__init__()
        self.bits, self.family, self.name, self.rows = operand.bits, operand.family, name, False
        empty = np.zeros(0, np.float32)
        scale, zero_point, boundaries, ranks = empty, empty, empty, np.zeros(0, np.uint8)
        if isinstance(operand, HLUQOperand | TableOperand):
            boundaries, ranks = operand.boundaries, operand.rank_codes
        elif isinstance(operand, GroupedOperand):
            labels = operand.labels()
            scale, zero_point = operand.scales[labels], operand.zero_points[labels]
        elif isinstance(operand, UniformOperand):
            scale, zero_point = np.atleast_1d(operand.scale), np.atleast_1d(operand.zero_point)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.float32))
        self.register_buffer("boundaries", torch.tensor(boundaries, dtype=torch.float32))
        self.register_buffer("rank_codes", torch.tensor(ranks, dtype=torch.uint8))
        self.register_buffer("levels", torch.zeros(0) if levels is None else levels.detach().float().clone())

    @property
    def top(self) -> int:
        """The largest code."""
        return top(self.bits)

    @torch.compiler.disable
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Codes of x, or of its sum with ``other``."""
        if other is not None and (x.dtype, x.shape) != (other.dtype, other.shape):
            x, other = x + other, None
        if x.dtype != torch.float32:
            x, other = (x if other is None else x + other).float(), None
        if self.rows and x.ndim == 3 and (other is not None or not x.is_contiguous()):
            return backend_for(x).encode_matrices(self, x, other)
        x = x if other is None else x + other
        return backend_for(x).encode(self, x.contiguous() if self.rows or not is_dense(x) else x)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of the codes, bit-equal to the fake quantizer's."""
        if len(self.levels):
            return self.levels[codes.long()]
        return (codes.float() - self.zero_point) * self.scale

    def extra_repr(self) -> str:
        return f"{self.family}, bits={self.bits}"


class Decoder(nn.Module):
    """Values of an encoder's codes, for what reads them in floating point (relative positions)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self._encoder = (encoder,)  # in a tuple: it has its own place in the unit

    def forward(self, codes: Tensor) -> Tensor:
        return self._encoder[0].decode(codes)


class ChannelCoder(nn.Module):
    """Codes of a Linear's outputs by the uniform encoders that read them, each some of the channels.

    Attributes:
        scale, zero_point: float32 (n,), of each channel.
        top: the largest code.
    """

    def __init__(self, encoders: Sequence[Encoder], channels: Sequence[Tensor], n: int):
        super().__init__()
        self.top, first = encoders[0].top, encoders[0].scale
        self.register_buffer("scale", first.new_zeros(n))
        self.register_buffer("zero_point", first.new_zeros(n))
        for encoder, some in zip(encoders, channels, strict=True):
            self.scale[some], self.zero_point[some] = encoder.scale, encoder.zero_point

    def encode(self, x: Tensor) -> Tensor:
        """uint8 (..., n) codes of float32 x."""
        return torch.round(x / self.scale).add_(self.zero_point).clamp_(0, self.top).to(torch.uint8)
