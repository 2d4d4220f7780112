# SPDX-License-Identifier: Apache-2.0
"""Attention of ``nn.MultiheadAttention`` and the function behind it, written out for the tracer: projections, heads,
matmul, softmax, matmul."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ahcq_plugin.graph.tracer import BlockTracer

_FUNCTION = inspect.signature(F.multi_head_attention_forward)


def why_kept(module: nn.MultiheadAttention) -> str | None:
    """Why an attention stays one node, which nothing quantizes and `prepare` refuses; None: it is written out."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "keys and values that it adds (add_bias_kv, add_zero_attn) are not supported"
    return None


def multihead_attention(
    tracer: BlockTracer,
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
    weights = module.in_proj_weight
    if weights is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    projected = _project((query, key, value), weights, module.in_proj_bias, module.embed_dim)
    context, shown = _attend(
        tracer,
        projected,
        (module.num_heads, module.head_dim),
        -3 if module.batch_first else 0,
        (attn_mask, key_padding_mask, is_causal),
        module.dropout if module.training else 0.0,
    )
    out = F.linear(context, module.out_proj.weight, module.out_proj.bias)
    return out, _shown(tracer, shown, need_weights, average_attn_weights)


def functional_attention(tracer: BlockTracer, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """``F.multi_head_attention_forward`` on traced tensors, as ``multihead_attention``.

    Returns:
        None where it adds keys and values, or is given them, or its weights are no parameters: it stays one node.
    """
    call = _FUNCTION.bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    separate = a["use_separate_proj_weight"]
    weights = tuple(a[f"{name}_proj_weight"] for name in "qkv") if separate else a["in_proj_weight"]
    first = _parameter(tracer, weights[0] if separate else weights)
    if (
        first is None
        or a["add_zero_attn"]
        or any(a[n] is not None for n in ("bias_k", "bias_v", "static_k", "static_v"))
    ):
        return None
    width = len(first) // (1 if separate else 3)
    projected = _project((a["query"], a["key"], a["value"]), weights, a["in_proj_bias"], width)
    masks = (a["attn_mask"], a["key_padding_mask"], a["is_causal"])
    dropout = a["dropout_p"] if a["training"] else 0.0
    context, shown = _attend(tracer, projected, (a["num_heads"], width // a["num_heads"]), 0, masks, dropout)
    out = F.linear(context, a["out_proj_weight"], a["out_proj_bias"])
    return out, _shown(tracer, shown, a["need_weights"], a["average_attn_weights"])


def _parameter(tracer: BlockTracer, value: Any) -> nn.Parameter | None:
    """The parameter that a traced value reads."""
    if not isinstance(value, fx.Proxy) or value.node.op != "get_attr":
        return None
    return dict(tracer.root.named_parameters()).get(str(value.node.target))  # attributes give proxies meanwhile


def _project(inputs: tuple, weights: Any, bias: Any, width: int) -> list[Any]:
    """q, k and v, (…, width) each, by one matrix (3 * width, in) or by three."""
    rows = [slice(i * width, (i + 1) * width) for i in range(3)]
    if isinstance(weights, tuple):
        biases = [None if bias is None else bias[part] for part in rows]
        return [F.linear(*call) for call in zip(inputs, weights, biases, strict=True)]
    parts: list[Any] = []
    while len(parts) < 3:
        first = last = len(parts)
        while last < 2 and inputs[last + 1] is inputs[first]:
            last += 1
        count, taken = last - first + 1, slice(rows[first].start, rows[last].stop)
        weight, own_bias = weights, bias
        if count < 3:
            weight, own_bias = weights[taken], None if bias is None else bias[taken]
        packed = F.linear(inputs[first], weight, own_bias)
        chunks = packed.chunk(count, -1) if count > 1 else [packed]
        parts += [chunks[i] for i in range(count)]
    return parts


def _attend(
    tracer: BlockTracer, projected: list[Any], heads: tuple[int, int], sequence: int, masks: tuple, dropout: float
) -> tuple[Any, Any]:
    """(context, weights); ``heads``: number and width, ``sequence``: which dimension of (…, heads, width) is the
    length, the same with and without a batch."""
    mask, padding, is_causal = masks
    if is_causal and mask is None:
        raise ValueError("nn.MultiheadAttention: `is_causal` needs an `attn_mask`")
    q, k, v = (part.unflatten(-1, heads).movedim(sequence, -2) for part in projected)
    scores = q @ k.transpose(-2, -1) * heads[1] ** -0.5
    if mask is not None or padding is not None:
        scores = tracer.create_proxy("call_function", mask_heads, (scores, mask, padding), {})
    weights = scores.softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout, True)
    return (weights @ v).movedim(-2, sequence).flatten(-2), weights


def _shown(tracer: BlockTracer, weights: Any, is_wanted: bool, averaged: bool) -> Any:
    """The weights as the attention returns them."""
    if not is_wanted or not averaged:
        return weights if is_wanted else None
    mean = weights.mean(-3)
    tracer.optional.append(mean.node)  # asked for by default, seldom used
    return mean


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
