# SPDX-License-Identifier: Apache-2.0
"""Quantizers as ONNX operators, bit-equal to the fake quantizers: QDQ where it can say it, else comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.tables import Table
from ahcq_plugin.quantizers import CAGFakeQuantize, FakeQuantize, TableFakeQuantize, UniformFakeQuantize
from ahcq_plugin.quantizers.base import per_channel
from ahcq_plugin.quantizers.head_axis import HeadAxis

MAX_BITS = 8  # of the codes of QuantizeLinear before opset 21


def onnx_quantizer(quantizer: FakeQuantize) -> nn.Module:
    """A module without state of training whose forward equals that of a frozen activation quantizer, in ONNX terms."""
    if isinstance(quantizer, CAGFakeQuantize):
        return UniformQDQ(quantizer.params(), quantizer.bits, -1)
    if isinstance(quantizer, TableFakeQuantize):
        return TableLookup(quantizer.table())
    params = uniform.UniformParams(quantizer.scale, quantizer.zero_point)
    if isinstance(quantizer, UniformFakeQuantize) and quantizer.head_axis.count > 1:
        return HeadsQDQ(params, quantizer.bits, quantizer.head_axis)
    return UniformQDQ(params, quantizer.bits, quantizer.ch_axis)


class UniformQDQ(nn.Module):
    """QuantizeLinear to uint8, Clip to 2^bits - 1 below 8 bits, DequantizeLinear.

    QuantizeLinear divides, rounds half to even, adds the zero point and saturates: the same operations.

    Args:
        params: scale and zero point, one or one for each index of ``axis``.
        axis: of per-channel parameters, -1 for the last one.
    """

    def __init__(self, params: uniform.UniformParams, bits: int, axis: int):
        super().__init__()
        self.register_buffer("scale", params.scale.detach().float().clone())
        self.register_buffer("zero_point", params.zero_point.to(torch.uint8))
        self.bits, self.axis = bits, axis

    def forward(self, x: Tensor) -> Tensor:
        scalar = self.scale.numel() == 1
        scale, zero_point = (t.reshape(()) if scalar else t for t in (self.scale, self.zero_point))
        return QuantizeDequantize.apply(x, scale, zero_point, self.bits, self.axis)


class HeadsQDQ(nn.Module):
    """``UniformQDQ`` along the heads of a tensor, which is reshaped for it and back.

    Args:
        params: scale and zero point of each head.
    """

    def __init__(self, params: uniform.UniformParams, bits: int, heads: HeadAxis):
        super().__init__()
        self.heads = heads
        self.quantize = UniformQDQ(params, bits, 0)

    def forward(self, x: Tensor) -> Tensor:
        place = x.ndim - self.heads.from_end
        before, after = x.shape[:place], x.shape[place + 1 :]
        split = x.reshape(*before, -1, self.heads.count, self.heads.inner, *after)
        self.quantize.axis = place + 1
        return self.quantize(split).reshape(*before, x.shape[place], *after)


class StoredWeight(nn.Module):
    """The codes of a weight as uint8, and Cast, Sub, Mul along the output channels; stands for a weight quantizer.

    Not DequantizeLinear: onnxruntime 1.31 fuses it with the MatMul behind it into kernels that either quantize the
    other operand once more (MatMulNBits) or refuse grouped channels (MatMulIntegerToFloat).
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        quantizer = layer.weight_fake_quant
        params = quantizer.params(layer.weight.ndim)
        self.register_buffer("codes", quantizer.encode(layer.weight).to(torch.uint8))
        self.register_buffer("scale", params.scale.detach().clone())
        self.register_buffer("zero_point", params.zero_point.to(torch.uint8))

    def forward(self, weight: Tensor) -> Tensor:
        return (self.codes.float() - self.zero_point.float()) * self.scale


class TableLookup(nn.Module):
    """Level of each value by binary search among the boundaries: Gather, GreaterOrEqual and Where, one step a bit."""

    def __init__(self, table: Table):
        super().__init__()
        self.register_buffer("boundaries", table.boundaries.detach().clone())
        self.register_buffer("levels", table.levels.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rank = torch.zeros_like(x, dtype=torch.int64)
        step = len(self.levels) // 2
        while step:
            rank = torch.where(x >= self.boundaries[rank + (step - 1)], rank + step, rank)
            step //= 2
        return self.levels[rank]


class QuantizeDequantize(torch.autograd.Function):
    """``decode(encode(x))`` whose ONNX form keeps the codes visible; ``apply(x, scale, zero_point, bits, axis)``.

    scale (float32) and zero_point (uint8) are scalars, or have one value for each index of ``axis``; bits 2..8. The
    axis is not written where it is None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None) -> Tensor:
        if scale.ndim:
            scale, zero_point = per_channel(scale, axis, x.ndim), per_channel(zero_point, axis, x.ndim)
        params = uniform.UniformParams(scale, zero_point)
        # not fake_quantize: its operations in place keep the exporter from merging equal nodes around this one
        return uniform.decode(uniform.encode(x, params, bits), params, bits)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, bits: int, axis: int | None) -> Any:
        attributes = {} if axis is None else {"axis_i": axis}
        codes = g.op("QuantizeLinear", x, scale, zero_point, **attributes)
        if bits < MAX_BITS:  # QuantizeLinear saturates at 255
            ends = (torch.tensor(end, dtype=torch.uint8) for end in (0, 2**bits - 1))
            codes = g.op("Clip", codes, *(g.op("Constant", value_t=end) for end in ends))
        return g.op("DequantizeLinear", codes, scale, zero_point, **attributes).setType(x.type())
