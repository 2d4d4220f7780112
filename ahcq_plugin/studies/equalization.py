# SPDX-License-Identifier: Apache-2.0
"""Undo what can be undone before quantization: channels of equal ranges, by changes that leave the masks as they are.

A yardstick for the challenges: what a fold of scales and shifts into neighbouring weights repairs (RepQ-ViT and
SmoothQuant for LayerNorms, Nagel et al. 2019 between layers, keys less their mean as SageAttention has them) is no
merit of a quantizer. It moves all differences of channels into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.prequant.streams import shift_stream, two_way_streams
from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.studies.tensors import channel_ranges
from ahcq_plugin.support.batches import Forward
from ahcq_plugin.zoo.invariances import (
    attentions,
    encoder_norms,
    key_width,
    scale_norm,
    scale_queries,
    scale_relu_units,
    scale_values,
    shift_keys,
)

LEAST = 1e-3  # of the mean range: channels that hardly vary are left, other data may have them at work


@torch.no_grad()
def equalize(sam: nn.Module, items: Sequence[Any], forward: Forward) -> nn.Module:
    """Equal channel ranges of the encoder's LayerNorms, values, of queries and keys, and of ReLU units; channels of the
    decoder's LayerNorms and of keys centred. In place; ranges are of ``items``, of all of them together.

    None of these changes moves what another is measured on, so one pass measures all.
    """
    ranges = _measure(sam, items, forward)
    for name, norm, reader in encoder_norms(sam):
        scale_norm(norm, reader, _equal(ranges[name].abs().amax(0)))
    for name, stream in two_way_streams(sam):
        shift_stream(stream, -ranges[name].mean(0))
    for name, attention in attentions(sam):
        q, k, v = ranges[name].chunk(3, -1) if hasattr(attention, "qkv") else ranges[name]
        scale_values(attention, _equal(v.abs().amax(0)))
        if not hasattr(attention, "qkv"):
            shift_keys(attention, -k.mean(0))
        width = key_width(attention)
        reach = (q.abs().amax(0), k.diff(dim=0)[0] / 2)
        queries, keys = (size.view(-1, width).amax(0) for size in reach)
        both = _varies(queries) & _varies(keys)
        scale_queries(attention, torch.where(both, (keys / queries).sqrt(), 1.0))
    for number, layer in enumerate(sam.mask_decoder.transformer.layers):
        scale_relu_units(layer.mlp, _equal(ranges[f"layers.{number}.mlp"].amax(0)))
    return sam


def _measure(sam: nn.Module, items: Sequence[Any], forward: Forward) -> dict[str, Tensor]:
    """Name -> (2, channels) smallest and largest value; of an attention with separate projections (3, 2, channels)."""
    outputs: dict[str, nn.Module] = {name: norm for name, norm, _ in encoder_norms(sam)}
    outputs |= {name: stream.norm for name, stream in two_way_streams(sam)}
    for name, attention in attentions(sam):
        parts = ["qkv"] if hasattr(attention, "qkv") else ["q_proj", "k_proj", "v_proj"]
        outputs |= {f"{name}.{part}": attention.get_submodule(part) for part in parts}
    inputs = {f"layers.{n}.mlp": m.mlp.lin2 for n, m in enumerate(sam.mask_decoder.transformer.layers)}
    found: dict[str, Tensor] = {}

    def widen(name: str, x: Tensor) -> None:
        low, high = channel_ranges(x.permute(0, 2, 3, 1) if name == "image_encoder.neck.3" else x)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = torch.stack([low, high])

    with watched(outputs, lambda name, _, x, out: widen(name, out)), watched(inputs, lambda n, _, x, out: widen(n, x)):
        for item in items:
            forward(sam, item)
    for name, attention in attentions(sam):
        parts = ["qkv"] if hasattr(attention, "qkv") else ["q_proj", "k_proj", "v_proj"]
        together = [found.pop(f"{name}.{part}") for part in parts]
        found[name] = together[0] if len(together) == 1 else torch.stack(together)
    return found


def _equal(sizes: Tensor) -> Tensor:
    """Factors that give all channels that vary their mean size."""
    varies = _varies(sizes)
    return torch.where(varies, sizes[varies].mean() / sizes, 1.0)


def _varies(sizes: Tensor) -> Tensor:
    return sizes > LEAST * sizes.mean()
