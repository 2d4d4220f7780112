# SPDX-License-Identifier: Apache-2.0
"""Linear and Conv2d on codes: constant weights, float32 out, bit-equal to ``export.golden``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.export.matmul import Patches, accumulator_range, lane_starts, signed_bits
from ahcq_plugin.export.operands import Activation, GroupedOperand, HLUQOperand, SpecError, TableOperand, WeightOperand
from ahcq_plugin.integer.backends import backend_for
from ahcq_plugin.integer.encoder import ChannelCoder
from ahcq_plugin.integer.lanes import Lane, Pass, make_lanes
from ahcq_plugin.integer.packed import PackedWeight


class IntegerLinear(nn.Module):
    """``linear`` of the golden model: uint8 codes (..., k) to float32 (..., n).

    Attributes:
        lanes: accumulators, in the order in which their products are added.
        weight: packed codes (n, k), channels in the layer's own order.
        permutation: int64 (k,) order in which lanes read the channels; empty: as they are.
        starts: int64 (n, lanes), what each accumulator starts with.
        offset: float32 (n,), added once behind the lanes; empty for uniform families.
        bias: float32 (n,).
        fits_int32: every accumulator of every input fits int32.
    """

    def __init__(self, left: Activation, weight: WeightOperand, bias: np.ndarray, keep: bool = True):
        super().__init__()
        self.n, self.k = weight.codes.shape
        self.family, self.lanes = left.family, make_lanes(left, self.k)
        self.weight = PackedWeight(weight, keep)
        self.fits_int32 = signed_bits(*accumulator_range(left, weight, self.k)) <= 32
        self.right_top = int(np.abs(weight.signed()).max())
        order = left.permutation if isinstance(left, GroupedOperand) else np.zeros(0, np.int64)
        offset = np.zeros(0, np.float32)
        if isinstance(left, HLUQOperand | TableOperand):
            offset = left.offset * weight.signed().sum(1).astype(np.float32)
        self.register_buffer("permutation", torch.from_numpy(order.copy()))
        self.register_buffer("starts", torch.from_numpy(lane_starts(left, weight)))
        self.register_buffer("offset", torch.from_numpy(offset))
        self.register_buffer("bias", torch.from_numpy(bias.copy()))

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        rows = codes.reshape(-1, self.k)
        return self.rows(rows).view(*codes.shape[:-1], self.n)

    def rows(self, codes: Tensor) -> Tensor:
        """(m, k) codes to (m, n)."""
        return backend_for(codes).linear(self, codes)

    def passes(self, lane: Lane) -> list[Pass]:
        """The 8-bit products of a lane; right operands are signed weights, or 8-bit codes shifted by 128."""
        return list(lane.passes(max(self.right_top, 128)))

    def dequantize(self, sums: list[Tensor]) -> Tensor:
        """float32 (m, n) from the lanes' accumulators, int32 or int64 (m, n), by the golden model's order."""
        total = sums[0].to(torch.float32) * float(self.lanes[0].scale)
        for lane, acc in zip(self.lanes[1:], sums[1:], strict=True):
            total = total + acc.to(torch.float32) * float(lane.scale)
        if len(self.offset):
            total = total + self.offset
        return total * self.weight.scales + self.bias

    def extra_repr(self) -> str:
        return f"k={self.k}, n={self.n}, {self.family}, lanes={len(self.lanes)}"


class EncodedLinear(nn.Module):
    """A Linear whose outputs are wanted as codes alone: uint8 codes (..., k) to uint8 codes (..., n)."""

    def __init__(self, layer: IntegerLinear, coder: ChannelCoder):
        super().__init__()
        self.layer, self.coder = layer, coder

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        rows = codes.reshape(-1, self.layer.k)
        made = backend_for(rows).linear_codes(self.layer, self.coder, rows)
        return made.view(*codes.shape[:-1], self.layer.n)


class IntegerConv2d(IntegerLinear):
    """A convolution as ``linear`` on patches: uint8 codes (B, C, H, W) to float32 (B, n, H', W').

    Attributes:
        zero_code: what borders are padded with, the code of the value 0.
    """

    def __init__(self, left: Activation, weight: WeightOperand, bias: np.ndarray, patches: Patches, keep: bool = True):
        super().__init__(left, weight, bias, keep)
        if left.family != "uniform":
            raise SpecError(f"the input of a convolution must be uniform, got {left.family}")
        self.patches, self.zero_code = patches, int(left.zero_point)

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        windows = cut_windows(codes, self.patches, self.zero_code)
        batch, height, width = windows.shape[:3]
        rows = self.rows(windows.reshape(-1, self.k)).view(batch, height * width, self.n)
        out = rows.new_empty(batch, self.n, height * width)
        for channels, pixels in zip(out, rows, strict=True):
            channels.copy_(pixels.t())  # of two dimensions PyTorch transposes block by block, in a third of the time
        return out.view(batch, self.n, height, width)


class IntegerGroupedConv2d(nn.Module):
    """A convolution whose groups of channels are convolved apart: each group is a ``linear`` of the golden model.

    Args:
        left: uniform.
        weight: (n, k) of all groups, k that of one.
        bias: float32 (n,).
        patches: with the groups.
    """

    def __init__(self, left: Activation, weight: WeightOperand, bias: np.ndarray, patches: Patches, keep: bool = True):
        super().__init__()
        self.groups, self.patches, self.zero_code = patches.groups, patches, int(left.zero_point)
        self.scale = float(left.scale)
        self.weight = PackedWeight(weight, keep)
        if signed_bits(*accumulator_range(left, weight, weight.codes.shape[1])) > 31:
            raise SpecError("a convolution with groups must have sums of at most 31 bits")
        self.register_buffer("starts", torch.from_numpy(lane_starts(left, weight)[:, 0]).to(torch.int32))
        self.register_buffer("bias", torch.from_numpy(bias.copy()))

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        batch, channels, height, width = codes.shape
        grouped = codes.reshape(batch * self.groups, channels // self.groups, height, width)
        windows = cut_windows(grouped, self.patches, self.zero_code).flatten(3)
        _, height, width, k = windows.shape
        rows = windows.reshape(batch, self.groups, height * width, k)
        weight = self.weight.form("groups", lambda: self.weight.signed().int().view(self.groups, -1, k))
        per_group = weight.shape[1]
        out = codes.new_zeros((batch, self.groups, per_group, height * width), dtype=torch.int32)
        for column in range(k):  # k is small, that of one group
            out += rows[:, :, None, :, column].int() * weight[:, :, column, None]
        out = out.view(batch, -1, height * width) + self.starts[:, None]
        total = out.to(torch.float32) * self.scale
        return (total * self.weight.scales[:, None] + self.bias[:, None]).view(batch, -1, height, width)


def cut_windows(codes: Tensor, patches: Patches, zero_code: int) -> Tensor:
    """(B, H', W', C, kernel rows, kernel columns) view of padded (B, C, H, W) codes."""
    (up, across), (down, right) = patches.padding, patches.stride
    padded = F.pad(codes, (across, across, up, up), value=zero_code) if up or across else codes
    windows = padded.unfold(2, patches.kernel[0], down).unfold(3, patches.kernel[1], right)
    return windows.permute(0, 2, 3, 1, 4, 5)
