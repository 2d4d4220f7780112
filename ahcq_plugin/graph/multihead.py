# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention`` written out as projections, heads, matmul, softmax, matmul: what the tracer sees of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def why_kept(module: nn.MultiheadAttention) -> str | None:
    """Why an attention stays one node, which nothing quantizes and `prepare` refuses; None: it is written out."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "keys and values that it adds (add_bias_kv, add_zero_attn) are not supported"
    return None


def multihead_attention(
    tracer: fx.Tracer,
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """``nn.MultiheadAttention.forward`` on traced tensors; equal to it up to float rounding (1e-6 of values near 1).

    Neighbours among query, key and value that are one tensor share a projection, as in PyTorch. ``is_causal`` is the
    hint that it is in PyTorch: the mask is used.

    Returns:
        (output, weights); the latter None without ``need_weights``.
    Raises:
        ValueError: ``is_causal`` without a mask.
    """
    if is_causal and attn_mask is None:
        raise ValueError("nn.MultiheadAttention: `is_causal` needs an `attn_mask`")
    sequence = -3 if module.batch_first else 0  # of (…, length, heads, width); both right without a batch as well
    q, k, v = (
        part.unflatten(-1, (module.num_heads, module.head_dim)).movedim(sequence, -2)
        for part in _project(module, query, key, value)
    )
    scores = q @ k.transpose(-2, -1) * module.head_dim**-0.5
    if attn_mask is not None or key_padding_mask is not None:
        scores = tracer.create_proxy("call_function", mask_heads, (scores, attn_mask, key_padding_mask), {})
    weights = scores.softmax(-1)
    if module.training and module.dropout:
        weights = F.dropout(weights, module.dropout, True)
    context = (weights @ v).movedim(-2, sequence).flatten(-2)
    shown = None
    if need_weights:
        shown = weights.mean(-3) if average_attn_weights else weights
    return module.out_proj(context), shown


def _project(module: nn.MultiheadAttention, *inputs: Any) -> list[Any]:
    width, bias = module.embed_dim, module.in_proj_bias
    rows = [slice(i * width, (i + 1) * width) for i in range(3)]
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = [None if bias is None else bias[part] for part in rows]
        return [F.linear(*call) for call in zip(inputs, weights, biases, strict=True)]
    parts: list[Any] = []
    while len(parts) < 3:
        first = last = len(parts)
        while last < 2 and inputs[last + 1] is inputs[first]:
            last += 1
        taken = slice(rows[first].start, rows[last].stop)
        weight = module.in_proj_weight if last - first == 2 else module.in_proj_weight[taken]
        own_bias = bias if bias is None or last - first == 2 else bias[taken]
        packed = F.linear(inputs[first], weight, own_bias)
        if first == last:
            parts.append(packed)
        else:
            chunks = packed.chunk(last - first + 1, -1)
            parts += [chunks[i] for i in range(last - first + 1)]
    return parts


def mask_heads(scores: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
    """Apply the masks of ``nn.MultiheadAttention``, each bool (True forbids a key) or float (added).

    Args:
        scores: (batch, heads, queries, keys) floats; without the first dimension for inputs without a batch.
        mask: (queries, keys) or (batch * heads, queries, keys).
        padding: (batch, keys), or (keys,).
    Raises:
        TypeError: a mask is neither bool nor floating point.
    """
    if mask is not None:
        scores = _masked(scores, mask if mask.ndim == 2 else mask.reshape(scores.shape))
    return scores if padding is None else _masked(scores, padding[..., None, None, :])


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return scores + mask
    if mask.dtype != torch.bool:
        raise TypeError(f"masks of nn.MultiheadAttention are bool or floating point, got {mask.dtype}")
    return scores.masked_fill(mask, -math.inf)
