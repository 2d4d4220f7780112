# SPDX-License-Identifier: Apache-2.0
"""Changes of a Sam's weights that leave its masks as they are, to floating-point rounding.

Each scales or shifts a tensor inside the model and undoes it in the weights that read the tensor. What can be changed
so follows from where a tensor goes: a LayerNorm of the image encoder feeds one Linear, so its channels may have any
size. Those of the mask decoder may be shifted alone: :mod:`~ahcq_plugin.prequant.streams`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def encoder_norms(sam: nn.Module) -> Iterator[tuple[str, nn.LayerNorm, nn.Linear]]:
    """(name, LayerNorm, the one Linear that reads it) of all blocks of the image encoder."""
    for number, block in enumerate(sam.image_encoder.blocks):
        yield f"image_encoder.blocks.{number}.norm1", block.norm1, block.attn.qkv
        yield f"image_encoder.blocks.{number}.norm2", block.norm2, block.mlp.lin1


def attentions(sam: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, attention) of encoder and decoder, in the order of the model."""
    for part in ("image_encoder", "mask_decoder"):
        for name, module in sam.get_submodule(part).named_modules():
            if hasattr(module, "qkv") or hasattr(module, "q_proj"):
                yield f"{part}.{name}", module


def projection(attention: nn.Module, part: str) -> tuple[Tensor, Tensor]:
    """Weight (channels, in) and bias (channels,) behind ``q``, ``k`` or ``v``: views, to be changed in place."""
    if hasattr(attention, "qkv"):
        place = "qkv".index(part)
        return attention.qkv.weight.data.chunk(3)[place], attention.qkv.bias.data.chunk(3)[place]
    layer = attention.get_submodule(f"{part}_proj")
    return layer.weight.data, layer.bias.data


def key_width(attention: nn.Module) -> int:
    """How many channels of keys may have factors of their own: those of one head where relative positions, which all
    heads share, read the queries; else all."""
    channels = len(projection(attention, "k")[1])
    return channels // attention.num_heads if getattr(attention, "use_rel_pos", False) else channels


@torch.no_grad()
def scale_norm(norm: nn.LayerNorm, reader: nn.Linear, factors: Tensor) -> None:
    """Multiply the LayerNorm's channels by ``factors`` (channels,) > 0, divide the columns of the Linear by them.

    Zeros that pad windows stay zeros: this is why channels of the encoder are scaled and not shifted.
    """
    norm.weight.mul_(factors)
    norm.bias.mul_(factors)
    reader.weight.div_(factors)


@torch.no_grad()
def scale_values(attention: nn.Module, factors: Tensor) -> None:
    """Multiply values' channels by ``factors`` (channels,) != 0, divide the output projection's columns by them."""
    for rows in projection(attention, "v"):
        rows.mul_(factors if rows.ndim == 1 else factors[:, None])
    (attention.proj if hasattr(attention, "proj") else attention.out_proj).weight.div_(factors)


@torch.no_grad()
def scale_queries(attention: nn.Module, factors: Tensor) -> None:
    """Multiply queries' channels by ``factors`` (``key_width``,) != 0; keys and relative positions are divided."""
    repeated = factors.repeat(len(projection(attention, "q")[1]) // len(factors))
    for part, by in (("q", repeated), ("k", 1 / repeated)):
        for rows in projection(attention, part):
            rows.mul_(by if rows.ndim == 1 else by[:, None])
    if getattr(attention, "use_rel_pos", False):
        attention.rel_pos_h.div_(factors)
        attention.rel_pos_w.div_(factors)


@torch.no_grad()
def shift_keys(attention: nn.Module, offsets: Tensor) -> None:
    """Add ``offsets`` (channels,) to all keys: each query's scores change by one constant, which softmax takes away."""
    projection(attention, "k")[1].add_(offsets)


@torch.no_grad()
def scale_relu_units(mlp: nn.Module, factors: Tensor) -> None:
    """Multiply hidden units behind a ReLU by ``factors`` (hidden,) > 0, divide the columns that read them."""
    mlp.lin1.weight.mul_(factors[:, None])
    mlp.lin1.bias.mul_(factors)
    mlp.lin2.weight.div_(factors)


@torch.no_grad()
def split_gelu_units(mlp: nn.Module, units: Tensor, gains: Tensor) -> None:
    """Turn hidden ``units`` (n,) behind a GELU over and give each two more, ``gains`` (n,) > 0 times as large.

    GELU knows no factor, so with the width as it is no unit can be changed alone. But gelu(x) - gelu(-x) = x, hence
    gelu(x) = gelu(-x) + (gelu(a x) - gelu(-a x)) / a: a unit is three, two of which reach ``a`` times as far. The MLP
    gets 2 n units more; its layers are replaced by wider ones.
    """
    first, second = mlp.lin1, mlp.lin2
    rows, bias, columns = first.weight[units], first.bias[units], second.weight[:, units]
    large, small = gains[:, None] * rows, columns / gains
    weight, offset = first.weight.clone(), first.bias.clone()
    weight[units], offset[units] = -rows, -bias
    mlp.lin1 = _linear(torch.cat([weight, large, -large]), torch.cat([offset, gains * bias, -gains * bias]))
    mlp.lin2 = _linear(torch.cat([second.weight, small, -small], 1), second.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return layer
