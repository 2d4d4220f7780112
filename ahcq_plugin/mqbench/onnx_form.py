# SPDX-License-Identifier: Apache-2.0
"""Quantizers as ONNX operators; only uniform families have such a form.

Weights and tensors with one set of parameters become QuantizeLinear, Clip and DequantizeLinear, so that the codes stay
visible. CAG's activations become Div, Round, Add, Clip, Sub and Mul: ONNX allows QuantizeLinear along their last axis,
but onnxruntime then fuses it with the matmul behind it into a kernel that refuses a zero point for every channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.graph.tracer import check_fixed
from ahcq_plugin.quantizers import AdaRoundFakeQuantize, CAGFakeQuantize, FakeQuantize, UniformFakeQuantize
from ahcq_plugin.quantizers.base import per_channel

MAX_BITS = 8  # of ONNX's codes in opset 13


class _QuantizeDequantize(torch.autograd.Function):
    """``uniform.fake_quantize`` whose ONNX form keeps the codes visible."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, bits: int) -> Tensor:
        params = uniform.UniformParams(per_channel(scale, axis, x.ndim), per_channel(zero_point, axis, x.ndim))
        return uniform.fake_quantize(x, params, bits)

    @staticmethod
    def symbolic(g, x: Any, scale: Any, zero_point: Any, axis: int, bits: int) -> Any:
        attributes = {} if axis == -1 else {"axis_i": axis}
        codes = g.op("QuantizeLinear", x, scale, zero_point, **attributes)
        if bits < MAX_BITS:  # QuantizeLinear saturates at 255
            lowest, highest = (g.op("Constant", value_t=torch.tensor(v, dtype=torch.uint8)) for v in (0, 2**bits - 1))
            codes = g.op("Clip", codes, lowest, highest)
        return g.op("DequantizeLinear", codes, scale, zero_point, **attributes)


def refusal(quantizer: FakeQuantize) -> str | None:
    """Why a quantizer has no ONNX form; None if it has one."""
    if not isinstance(quantizer, (UniformFakeQuantize, CAGFakeQuantize, AdaRoundFakeQuantize)):
        return f"family {quantizer.family}"
    if quantizer.bits > MAX_BITS:
        return f"{quantizer.bits} bits"
    if isinstance(quantizer, AdaRoundFakeQuantize) and quantizer.adaround:
        return "rounding still being learned"
    return None


def check_exportable(model: nn.Module) -> None:
    """Raise unless every quantizer of ``model`` has an ONNX form.

    Raises:
        ValueError: names the quantizers, their families and what to do.
    """
    found = [(name, refusal(module)) for name, module in model.named_modules() if isinstance(module, FakeQuantize)]
    problems = [f"{name} ({reason})" for name, reason in found if reason]
    if problems:
        raise ValueError(f"ONNX cannot express {len(problems)} quantizers: {', '.join(problems[:5])}; {ADVICE}")


ADVICE = (
    "only uniform and cag of at most 8 bits, hard-rounded, can be exported: choose these families, for example with "
    "{'recipe': {'name': 'ahcq', 'hluq': False, 'lnq': False}}"
)


def drop_fixed_arguments(model: fx.GraphModule) -> None:
    """Remove the arguments that were fixed to their defaults when ``model`` was traced, in place: the exporter would
    pass them as tensors."""
    for node in list(model.graph.nodes):
        if node.target is check_fixed:
            model.graph.erase_node(node)
    for node in list(model.graph.nodes):
        if node.op == "placeholder" and node.args and not node.users:
            model.graph.erase_node(node)
    model.recompile()


def quantize_dequantize(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    """The quantizer's forward in a form that ``torch.onnx.export`` understands; equal values.

    Raises:
        ValueError: the quantizer has no such form.
    """
    reason = refusal(quantizer)
    if reason:
        raise ValueError(f"ONNX cannot express a quantizer ({reason}); {ADVICE}")
    params = quantizer.params()
    scale, zero_point = params.scale.detach(), params.zero_point
    if isinstance(quantizer, CAGFakeQuantize):
        zero_point = zero_point.to(torch.float32)
        codes = torch.clamp(torch.round(x.float() / scale) + zero_point, 0, quantizer.quant_max)
        return ((codes - zero_point) * scale).to(x.dtype)
    if quantizer.ch_axis == -1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return _QuantizeDequantize.apply(x, scale, zero_point.to(torch.uint8), quantizer.ch_axis, quantizer.bits)
