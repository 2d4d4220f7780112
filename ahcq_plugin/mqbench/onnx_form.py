# SPDX-License-Identifier: Apache-2.0
"""Quantizers as ONNX operators; only uniform families have such a form.

Weights and tensors with one set of parameters become QuantizeLinear, Clip and DequantizeLinear, so that the codes stay
visible. CAG's activations become Div, Round, Add, Clip, Sub and Mul: ONNX allows QuantizeLinear along their last axis,
but onnxruntime then fuses it with the matmul behind it into a kernel that refuses a zero point for every channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.export.onnx_quantizers import MAX_BITS, QuantizeDequantize
from ahcq_plugin.graph.fixed import check_fixed
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.quantizers import AdaRoundFakeQuantize, CAGFakeQuantize, FakeQuantize, UniformFakeQuantize


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
    reasons = {name: refusal(quantizer) for name, quantizer in quantizers(model)}
    problems = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
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
    axis = quantizer.channel_axis(x.ndim)
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return QuantizeDequantize.apply(x, scale, zero_point.to(torch.uint8), quantizer.bits, axis)
