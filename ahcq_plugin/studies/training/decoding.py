# SPDX-License-Identifier: Apache-2.0
"""Sam's mask decoder for boxes on several images at once, evaluated only where a loss needs it.

The published ``MaskDecoder.predict_masks`` takes one image and up-scales whole maps. Here the two transposed
convolutions, whose kernels do not overlap, are applied as matrix products to chosen tokens only; a test holds the
result equal to the published path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn


def decode_tokens(sam: Sam, embedding: Tensor, owner: Tensor, boxes: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Single-mask logits of ``boxes`` at the chosen tokens.

    Args:
        embedding: (B, C, G, G) output of the image encoder.
        owner: (N,) int64, the image of each box. boxes: (N, 4) float32, xyxy in input pixels.
        chosen: (N, G*G) bool, the tokens wanted.

    Returns: logits (T, 4, 4), T the number of ones in ``chosen``, in its row-major order, where entry
        [2a + b, 2c + d] belongs to the pixel (2a + c, 2b + d) of the token's 4x4; predicted IoU (N,).
    """
    decoder, prompt = sam.mask_decoder, sam.prompt_encoder
    sparse, dense = prompt(points=None, boxes=boxes, masks=None)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(boxes), -1, -1), sparse], 1)
    # one dtype for all that has 1024 tokens: mixing would copy large tensors at every addition
    position = prompt.get_dense_pe().to(embedding.dtype).expand(len(boxes), -1, -1, -1)
    source = embedding[owner] + prompt.no_mask_embed.weight.to(embedding.dtype)[..., None, None]
    states, keys = decoder.transformer(source, position, tokens)
    box, token = chosen.nonzero(as_tuple=True)
    vectors = decoder.output_hypernetworks_mlps[0](states[:, 1])[box]
    first, norm, _, second, _ = decoder.output_upscaling
    x = F.linear(keys[box, token], *_as_linear(first)).unflatten(1, (4, -1))
    x = F.gelu(F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps))
    x = F.gelu(F.linear(x, *_as_linear(second)).unflatten(2, (4, -1)))
    logits = (x.flatten(1, 2) @ vectors[..., None])[..., 0].unflatten(1, (4, 4))
    return logits, decoder.iou_prediction_head(states[:, 0])[:, 0]


def split_pixels(maps: Tensor, grid: int) -> Tensor:
    """Maps (N, 4G, 4G) as (N, G*G, 4, 4) in the order of :func:`decode_tokens`."""
    count = len(maps)
    return maps.view(count, grid, 2, 2, grid, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(count, grid * grid, 4, 4)


def _as_linear(conv: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight (4 * out, in) and bias of a 2x2 transposed convolution with stride 2, for one token."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4)
