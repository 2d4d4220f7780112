# SPDX-License-Identifier: Apache-2.0
"""LayerNorms of SAM's two-way transformer, whose channels can be shifted: what each feeds, and where a shift ends.

Such a norm feeds Linears, whose biases can give way, and is added to another layer's output, whose bias can too,
before the next LayerNorm. So each channel may be shifted, and not scaled: a scale would change the mean and the
variance of the sum. Keys of the last layer go into a transposed convolution as well, whose four corners would take four
biases: they stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NORMS = ("norm1", "norm2", "norm3", "norm4")
_ATTENTIONS = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")


@dataclass(frozen=True)
class Stream:
    """A LayerNorm of a two-way transformer (or the last one of the image encoder's neck) with all that reads it.

    Attributes:
        norm: has ``weight`` and ``bias`` (channels,).
        readers: Linears that read its output, alone or with positions added.
        join: Linear whose output is added to it, before the next LayerNorm normalises the sum.
    """

    norm: nn.Module
    readers: tuple[nn.Linear, ...]
    join: nn.Linear

    @property
    def biases(self) -> list[nn.Parameter | None]:
        """All that a shift changes; None where a layer has none, and cannot give way."""
        return [getattr(layer, "bias", None) for layer in (self.norm, *self.readers, self.join)]


def two_way_streams(model: nn.Module) -> Iterator[tuple[str, Stream]]:
    """(name of the LayerNorm, Stream) of everything that can be shifted in the two-way transformers inside ``model``,
    by the names that segment_anything and SAM 2 give their parts; traced or not."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        layers = getattr(module, "layers", None)
        final = getattr(module, "final_attn_token_to_image", None)
        if isinstance(layers, nn.ModuleList) and final is not None and all(map(_is_two_way, layers)):
            yield from _streams(name, layers, final, _neck_norm(modules, name))


def _is_two_way(layer: nn.Module) -> bool:
    return all(hasattr(layer, part) for part in (*_NORMS, *_ATTENTIONS, "mlp"))


def _neck_norm(modules: Mapping[str, nn.Module], transformer: str) -> tuple[str, nn.Module | None]:
    """The norm that keys of the first layer come from, where a Sam's neck ends with one."""
    name = f"{transformer.removesuffix('mask_decoder.transformer')}image_encoder.neck.3"
    is_last = f"{name[:-1]}4" not in modules
    return name, modules.get(name) if transformer.endswith("mask_decoder.transformer") and is_last else None


def _streams(
    name: str, layers: nn.ModuleList, final: nn.Module, keys: tuple[str, nn.Module | None]
) -> Iterator[tuple[str, Stream]]:
    for number, layer in enumerate(layers):
        prefix = f"{name}.layers.{number}"
        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        first, *_, last = [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)]
        keys_name, keys_norm = keys
        if keys_norm is not None:
            yield keys_name, Stream(keys_norm, (to_image.k_proj, to_image.v_proj, to_token.q_proj), to_token.out_proj)
        yield f"{prefix}.norm1", Stream(layer.norm1, (to_image.q_proj,), to_image.out_proj)
        yield f"{prefix}.norm2", Stream(layer.norm2, (first,), last)
        own = (to_token.k_proj, to_token.v_proj)
        if number + 1 < len(layers):
            following = layers[number + 1].self_attn
            readers = (following.q_proj, following.k_proj, following.v_proj)
            yield f"{prefix}.norm3", Stream(layer.norm3, (*own, *readers), following.out_proj)
        else:
            yield f"{prefix}.norm3", Stream(layer.norm3, (*own, final.q_proj), final.out_proj)
        keys = f"{prefix}.norm4", layer.norm4


@torch.no_grad()
def shift_stream(stream: Stream, offsets: Tensor) -> None:
    """Add ``offsets`` (channels,) to what the LayerNorm gives; readers' biases and the layer that is added give way."""
    stream.norm.bias.add_(offsets)
    for reader in stream.readers:
        reader.bias.sub_(reader.weight @ offsets)
    stream.join.bias.sub_(offsets)
