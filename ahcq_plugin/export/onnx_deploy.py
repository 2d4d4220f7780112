# SPDX-License-Identifier: Apache-2.0
"""A quantized model in the QDQ form that runtimes execute on integers: one scale a tensor, int8 weights by channel.

What has that form already keeps its numbers: uniform quantizers of 8 bits with one scale a tensor, and weights of at
most 7 bits. Every other quantizer becomes the nearest that has it: of activations 256 equal steps from the least level
to the greatest, of weights 255 around 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.export.onnx_int4 import INT4_BITS
from ahcq_plugin.export.onnx_quantizers import MAX_BITS, UniformQDQ
from ahcq_plugin.export.sites import find_sites
from ahcq_plugin.functional import uniform
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.quantizers import FakeQuantize, TableFakeQuantize
from ahcq_plugin.quantizers.base import per_channel

LARGEST = 2 ** (MAX_BITS - 1) - 1  # code of an int8 weight around 0


def has_standard_form(quantizer: FakeQuantize) -> bool:
    """Whether an activation quantizer is QuantizeLinear and DequantizeLinear with one scale and all 256 codes."""
    return quantizer.family == "uniform" and quantizer.bits == MAX_BITS and quantizer.scale.numel() == 1


@torch.no_grad()
def deploy_quantizer(quantizer: FakeQuantize) -> UniformQDQ:
    """The stand-in of a frozen activation quantizer: itself where it has the standard form, else the nearest."""
    if has_standard_form(quantizer):
        return UniformQDQ(uniform.UniformParams(quantizer.scale, quantizer.zero_point), MAX_BITS, -1)
    return UniformQDQ(uniform.qparams_from_range(*level_range(quantizer), MAX_BITS), MAX_BITS, -1)


def level_range(quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
    """Least and greatest level of a quantizer, (1,) float32 each; over all channels or heads."""
    if isinstance(quantizer, TableFakeQuantize):
        levels = quantizer.table().levels
    else:
        zero_point, scale = quantizer.zero_point.float(), quantizer.scale
        levels = torch.cat([-zero_point * scale, (quantizer.quant_max - zero_point) * scale])
    return levels.min().reshape(1), levels.max().reshape(1)


class DequantizedWeight(nn.Module):
    """DequantizeLinear of a weight's codes by output channel; stands for a weight quantizer.

    Codes are int8 with the zero point 0: OpenVINO computes on integers with no other. Weights of at most 7 bits are
    code - zero point, exactly; those of 8 bits, whose differences have 9, are rounded to 255 equal steps around 0. With
    ``int4`` weights of at most 4 bits keep their zero points, so that a code is a signed integer of 4 bits.

    Attributes:
        codes: int8 in the weight's shape.
        scale: (N,) float32.
        zero_point: (N,) int8.
    """

    def __init__(self, layer: nn.Module, int4: bool = False):
        super().__init__()
        quantizer, weight = layer.weight_fake_quant, layer.weight
        codes, ones = quantizer.encode(weight), torch.ones(len(weight), device=weight.device)
        scale, zero_point = (quantizer.scale * ones).detach().float(), quantizer.zero_point * ones
        if int4 and quantizer.bits <= INT4_BITS:
            half = 2 ** (INT4_BITS - 1)
            codes, zero_point = codes - half, zero_point - half
        else:
            codes = codes - per_channel(zero_point, 0, codes.ndim)
            zero_point = torch.zeros_like(zero_point)
            if quantizer.bits >= MAX_BITS:
                greatest = codes.flatten(1).abs().amax(1).clamp(min=1)
                codes = torch.round(codes * per_channel(LARGEST / greatest.double(), 0, codes.ndim))
                scale = (scale.double() * greatest / LARGEST).float()
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        return Dequantize.apply(self.codes, self.scale, self.zero_point, 0)


class DeployLinear(nn.Module):
    """A Linear with a ``DequantizedWeight``, which is stored as the right operand of MatMul, (in, out).

    The bias is added in three dimensions: onnxruntime would make a Gemm of MatMul and a vector, and compute that in
    floating point.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        stored = layer.weight_fake_quant
        self.register_buffer("codes", stored.codes.t().contiguous())
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().reshape(1, 1, -1).clone())

    def forward(self, input: Tensor) -> Tensor:
        product = input @ Dequantize.apply(self.codes, self.scale, self.zero_point, 1)
        if self.bias is None:
            return product
        return product + (self.bias if product.ndim > 2 else self.bias[0])


class Dequantize(torch.autograd.Function):
    """``(codes - zero_point) * scale``; ``apply(codes, scale, zero_point, axis)``: int8, float32 and int8 by axis."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        difference = codes.float() - per_channel(zero_point.float(), axis, codes.ndim)
        return difference * per_channel(scale, axis, codes.ndim)

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        out = g.op("DequantizeLinear", codes, scale, zero_point, axis_i=axis)
        return out.setType(codes.type().with_dtype(torch.float32))


def scale_products(unit: fx.GraphModule) -> None:
    """Move factors between a quantizer and its matmul behind the matmul, in place: (s·a) @ b becomes s·(a @ b).

    A runtime sees integers where both operands come from DequantizeLinear. The product differs by roundings only.
    """
    index = GraphIndex(unit, unit.graph)
    for site in find_sites(unit)[0]:
        if site.right is None:
            continue
        for scaling in (*site.left.scalings, *site.right.scalings):
            if len(scaling.users) == 1:  # else others read the scaled values
                _move_behind(site.node, scaling, index.scale_source(scaling))
    unit.recompile()


def _move_behind(matmul: fx.Node, scaling: fx.Node, operand: fx.Node) -> None:
    scaling.replace_all_uses_with(operand)
    with matmul.graph.inserting_after(matmul):
        scaled = matmul.graph.node_copy(scaling, lambda node: node)
    matmul.replace_all_uses_with(scaled)
    scaled.replace_input_with(operand, matmul)
    matmul.graph.erase_node(scaling)
