# SPDX-License-Identifier: Apache-2.0
"""Linear and Conv2d that quantize their weight in forward; parameters keep their names and identity."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class QuantLinear(nn.Linear):
    """``F.linear(x, weight_fake_quant(weight), bias)``.

    ``original_weight`` is the weight before a transform that changes the layer's function (ACNR), else None: the target
    of reconstruction. It is kept outside the state and dropped once the layer is hard-rounded.
    """

    original_weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear's: models call it by keyword too
        return F.linear(input, self.weight_fake_quant(self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """``conv2d(x, weight_fake_quant(weight), bias)``; ``original_weight`` as in ``QuantLinear``."""

    original_weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias)


def quantize_layer(layer: nn.Linear | nn.Conv2d, weight_fake_quant: nn.Module) -> QuantLinear | QuantConv2d:
    """A quantized layer that shares the parameters of ``layer``.

    Raises:
        TypeError: ``layer`` is neither nn.Linear nor nn.Conv2d.
    """
    if isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Conv2d):
        new = QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            _pair(layer.dilation),
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    else:
        raise TypeError(f"only nn.Linear and nn.Conv2d can be quantized, got {type(layer).__name__}")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_fake_quant = weight_fake_quant
    return new.train(layer.training)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Of a Conv2d two; torch declares them once for all convolutions, of any number."""
    vertical, horizontal = sizes
    return vertical, horizontal
