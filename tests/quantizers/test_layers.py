# SPDX-License-Identifier: Apache-2.0
"""Quantized convolutions of every kind against a dense convolution written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ahcq_plugin.quantizers import AdaRoundFakeQuantize
from ahcq_plugin.quantizers.layers import quantize_layer

OPTIONS = {
    "groups": dict(groups=3),
    "depthwise": dict(groups=6),
    "depthwise, strided": dict(groups=6, stride=2, padding=1),
    "grouped, dilated": dict(groups=2, dilation=(2, 1), padding=(2, 0)),
    "padding by name": dict(groups=2, padding="same", bias=False),
    "reflected borders": dict(groups=3, padding=1, padding_mode="reflect"),
}


def dense(weight: Tensor, groups: int) -> Tensor:
    """The kernel of the same convolution without groups: zeros where a group does not look."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    full = weight.new_zeros(len(weight), inputs * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return full


def calibrated(layer: nn.Conv2d) -> nn.Module:
    made = quantize_layer(layer, AdaRoundFakeQuantize(quant_max=15)).eval()
    with torch.no_grad():
        made.weight_fake_quant.activation_post_process(made.weight)
        made.weight_fake_quant.commit()
    made.weight_fake_quant.enable_fake_quant()
    return made


@pytest.mark.parametrize("kind", OPTIONS)
def test_grouped_convolutions_compute_on_quantized_weights(kind):
    options = OPTIONS[kind]
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 12, 3, **options).eval(), torch.randn(2, 6, 9, 8)
    made = calibrated(layer)
    assert made.weight is layer.weight and made.bias is layer.bias
    quantizer = made.weight_fake_quant
    weight = quantizer.decode(quantizer.encode(layer.weight))
    assert quantizer.scale.numel() == 12 and float((weight - layer.weight).abs().max()) > 0
    twin = nn.Conv2d(6, 12, 3, **{**options, "groups": 1}).eval()
    with torch.no_grad():
        twin.weight.copy_(dense(weight, layer.groups))
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
        torch.testing.assert_close(made(x), twin(x))
        quantizer.enable_fake_quant(False)
        assert torch.equal(made(x), layer(x))


def test_each_group_is_quantized_as_if_it_stood_alone():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, groups=3)
    codes = [calibrated(layer).weight_fake_quant.encode(layer.weight)]
    for part in layer.weight.detach().split(4):
        alone = nn.Conv2d(2, 4, 3)
        alone.weight.data = part.clone()
        codes.append(calibrated(alone).weight_fake_quant.encode(alone.weight))
    assert torch.equal(codes[0], torch.cat(codes[1:]))


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2)])
def test_other_convolutions_are_refused(layer):
    with pytest.raises(TypeError, match=f"only nn.Linear and nn.Conv2d can be quantized, got {type(layer).__name__}"):
        quantize_layer(layer, AdaRoundFakeQuantize(quant_max=15))
