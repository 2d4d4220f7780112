# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest weights: how much a part of the model minds the crudest quantization."""

from __future__ import annotations

import copy

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

PARTS = ("image_encoder", "mask_decoder")


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Round (C, …) float weights to 2^bits levels per output channel, asymmetric, the range always containing zero.

    q = clamp(round(w / s) + z, 0, 2^b - 1), w_hat = (q - z) s with s = (max - min) / (2^b - 1), z = round(-min / s);
    half to even.
    """
    rows = weight.flatten(1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=torch.finfo(rows.dtype).tiny)
    zero = torch.round(-low / scale)
    codes = (torch.round(rows / scale) + zero).clamp(0, top)
    return ((codes - zero) * scale).view_as(weight)


def round_weights(sam: Sam, bits: int, parts: tuple[str, ...] = PARTS) -> Sam:
    """A copy with the weights of every Linear and convolution of ``parts`` rounded by :func:`round_rows`; transposed
    convolutions, whose first axis is the input, are rounded per input channel."""
    if not 2 <= bits <= 16:
        raise ValueError(f"`bits` must be in [2, 16], got {bits}")
    copied = copy.deepcopy(sam)
    for part in parts:
        for module in copied.get_submodule(part).modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                with torch.no_grad():
                    module.weight.copy_(round_rows(module.weight, bits))
    return copied
