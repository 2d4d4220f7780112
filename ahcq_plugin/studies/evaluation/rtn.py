# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest weights: how much a part of the model minds the crudest quantization."""

from __future__ import annotations

import copy

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ahcq_plugin.functional import uniform

PARTS = ("image_encoder", "mask_decoder")


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Round (C, …) float weights, each output channel to 2^bits uniform levels over its range (``functional.uniform``).

    Raises: ValueError: ``bits`` is no integer in [2, 16].
    """
    rows = weight.flatten(1)
    params = uniform.qparams_from_range(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits)
    return uniform.fake_quantize(rows, params, bits).view_as(weight)


def round_weights(sam: Sam, bits: int, parts: tuple[str, ...] = PARTS) -> Sam:
    """A copy with the weights of every Linear and convolution of ``parts`` rounded by :func:`round_rows`; transposed
    convolutions, whose first axis is the input, are rounded per input channel."""
    copied = copy.deepcopy(sam)
    for part in parts:
        for module in copied.get_submodule(part).modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                with torch.no_grad():
                    module.weight.copy_(round_rows(module.weight, bits))
    return copied
