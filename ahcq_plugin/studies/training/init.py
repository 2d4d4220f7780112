# SPDX-License-Identifier: Apache-2.0
"""Starting weights that spare a small model what every image model has to find out first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from ahcq_plugin.zoo.sam import build_sam


def init_sam(cfg: Mapping[str, Any], seed: int) -> Sam:
    """A Sam in training mode with random weights, apart from five places.

    - The frequencies of the position code, N(0, 1) in the package, are spread over 0.1 to 3: low ones let the decoder
      find a box within few steps, high ones place its sides within a patch.
    - Queries and keys between tokens and image share their starting weights: attention starts as a kernel of position.
    - The position embedding, zero in the package, starts as sines and cosines: the decoder reads positions from it.
    - The patch embedding starts as a whitened cosine transform, so that fine detail is not drowned by brightness.
    - Each attention head starts by looking at a neighbour in some direction (as ConViT does), through the biases of
      its queries and the tables of relative positions.
    """
    torch.manual_seed(seed)
    sam = build_sam(cfg, checkpoint=False).train()
    with torch.no_grad():
        start_decoder(sam.prompt_encoder, sam.mask_decoder)
        sam.image_encoder.pos_embed.copy_(0.3 * _waves(cfg["image_size"] // cfg["patch_size"], cfg["embed_dim"]))
        cosine_patches(sam.image_encoder.patch_embed.proj.weight)
        _local_heads(sam.image_encoder)
    return sam


@torch.no_grad()
def start_decoder(prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
    """The first two of those places, in SAM or SAM 2."""
    matrix = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    matrix *= torch.logspace(-1, math.log10(3), matrix.shape[1])
    for layer in mask_decoder.transformer.layers:
        for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
            attention.k_proj.weight.copy_(attention.q_proj.weight)
    last = mask_decoder.transformer.final_attn_token_to_image
    last.k_proj.weight.copy_(last.q_proj.weight)


def _waves(grid: int, channels: int) -> Tensor:
    """Sines and cosines of row and column with wavelengths of 6 to 600 tokens, (1, grid, grid, channels)."""
    count = channels // 4
    angle = torch.arange(grid)[:, None] * 0.01 ** (torch.arange(count) / count)
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    out = torch.zeros(1, grid, grid, channels)
    out[..., : 4 * count] = torch.cat([rows, columns], -1)
    return out


def cosine_patches(weight: Tensor) -> None:
    """Fill (C, 3, P, P) with the C lowest products of cosines, each scaled as if power fell with frequency squared;
    a random rotation spreads them over the channels."""
    channels, colours, side, _ = weight.shape
    index = torch.arange(side)
    waves = torch.cos(math.pi / side * (index + 0.5) * index[:, None]) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    opponent = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    opponent /= opponent.norm(dim=1, keepdim=True)
    basis = torch.einsum("kc,uy,vx->uvkcyx", opponent, waves, waves).reshape(-1, colours, side, side)
    frequency = (index[:, None] + index)[..., None].expand(-1, -1, colours).flatten()
    colour = torch.tensor([1.0, 3.0, 5.0]).repeat(side * side)  # colour varies less than brightness
    order = frequency.argsort(stable=True)[:channels]
    rows = (basis * ((1 + frequency) * colour)[:, None, None, None])[order] / side
    rotation = torch.linalg.qr(torch.randn(channels, channels)).Q[:, : len(rows)]
    weight.copy_((rotation @ rows.flatten(1)).view_as(weight))


def _local_heads(encoder: ImageEncoderViT) -> None:
    """Attention logit -(distance from a preferred offset)^2 / 4, offsets of 0 to 1.5 tokens, in windowed blocks."""
    for depth, block in enumerate(encoder.blocks):
        if not block.window_size or not block.attn.use_rel_pos:
            continue
        attention = block.attn
        heads = attention.num_heads
        size = attention.qkv.weight.shape[0] // (3 * heads)
        distance = torch.arange(attention.rel_pos_h.shape[0]) - attention.rel_pos_h.shape[0] // 2
        for table, first in ((attention.rel_pos_h, 0), (attention.rel_pos_w, 2)):
            table[:, first] = distance / 4
            table[:, first + 1] = distance**2 / 4
        for head in range(heads):
            angle = 2 * math.pi * (head / heads + depth * 0.382)
            reach = 1.5 if head else 0.0
            attention.qkv.weight[head * size : head * size + 4] *= 0.1  # at first the offset is that of the bias
            bias = attention.qkv.bias[head * size :]
            for first, offset in ((0, reach * math.sin(angle)), (2, reach * math.cos(angle))):
                # -(d - o)^2 / 4 without its constant; the table holds query minus key, hence the sign
                bias[first], bias[first + 1] = -2 * offset, -1.0
