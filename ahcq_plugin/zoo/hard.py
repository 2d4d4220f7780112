# SPDX-License-Identifier: Apache-2.0
"""A Sam with the same masks and harder tensors: what the AHCQ-SAM, PTQ4SAM and SAQ-SAM papers show of SAM-B, planted.

A small SAM has none of SAM-B's extremes, so that methods made against them cannot be told apart on it. Each knob of
``Hardness`` plants one of them by changes of the weights that leave the function as it is
(:mod:`~ahcq_plugin.zoo.invariances`, :mod:`~ahcq_plugin.prequant.streams`); ``docs/challenges.md`` has what it does to
the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.prequant.streams import shift_stream, two_way_streams
from ahcq_plugin.zoo.invariances import (
    attentions,
    encoder_norms,
    key_width,
    projection,
    scale_norm,
    scale_queries,
    scale_relu_units,
    scale_values,
    shift_keys,
    split_gelu_units,
)

SHARE = 0.03  # of channels that a knob makes outliers
TAIL_SHARE = 0.01  # of hidden units of the encoder that get long tails; each costs two units more
HALF_WIDTH = 4.0  # half the range of a normalised channel, in its standard deviations


@dataclass(frozen=True)
class Hardness:
    """How hard; 1 (0 for ``keys``) leaves a knob off. Knobs with outliers take 3 % of the channels, at least one, by
    factors between the square root of the knob and the knob, log-uniform (100: 10 to 100 times).

    Attributes:
        channels: factor of outlier channels of the encoder's LayerNorms, against columns of qkv and lin1.
        offsets: outlier channels of the decoder's LayerNorms are moved by so many halves of a channel's range.
        values: factor of outlier channels of values, against columns of the output projection; both parts.
        queries: factor of outlier channels of queries, against keys and relative positions; both parts.
        keys: distance of the decoder's keys' two modes from zero, in spreads that unit inputs would give keys.
        tails: reach of outlier hidden units, after GELU by three units for one (1 % of them), after ReLU by a factor.
        seed: of what is drawn; each knob draws for itself.
    """

    channels: float = 1.0
    offsets: float = 1.0
    values: float = 1.0
    queries: float = 1.0
    keys: float = 0.0
    tails: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for knob in knobs():
            least, value = off(knob), getattr(self, knob)
            if not least <= value <= 1e4:
                raise ValueError(f"hardness: `{knob}` must be in [{least:g}, 10000], got {value!r}; {least:g} is off")

    def only(self, knob: str) -> Hardness:
        """This setting of one knob, the others off."""
        return Hardness(seed=self.seed, **{knob: getattr(self, knob)})


def knobs() -> tuple[str, ...]:
    """Names of the knobs, in the order in which they are planted."""
    return tuple(field.name for field in dataclasses.fields(Hardness) if field.name != "seed")


def off(knob: str) -> float:
    """The value of a knob that changes nothing."""
    return float(getattr(Hardness, knob))  # the class has the defaults


#: Of ``build_sam("sam_tiny_hard")``.
SAM_TINY_HARD = Hardness(channels=100.0, offsets=10.0, values=4.0, queries=4.0, keys=4.0, tails=10.0)


def hard_config(config: Mapping[str, Any], hardness: Hardness) -> dict[str, Any]:
    """``config`` as ``build_sam`` takes it, with the MLPs of the encoder as wide as ``harden`` makes them."""
    if hardness.tails == 1:
        return dict(config)
    hidden = int(config["embed_dim"] * config["mlp_ratio"])
    # half a unit more: the constructor cuts the product
    return {**config, "mlp_ratio": (hidden + 2 * _count(hidden, TAIL_SHARE) + 0.5) / config["embed_dim"]}


def harden(sam: nn.Module, hardness: Hardness) -> nn.Module:
    """Plant what ``hardness`` says into a Sam of ``segment_anything``, in place; computed in float64.

    Returns: ``sam``, its masks as before to the rounding of its parameters' dtype.
    """
    dtype = next(sam.image_encoder.parameters()).dtype
    parts = (sam.image_encoder, sam.mask_decoder)  # not the prompt encoder: its positions are float32
    for part in parts:
        part.double()
    for number, knob in enumerate(knobs()):
        strength = getattr(hardness, knob)
        if strength != off(knob):
            _PLANTS[knob](sam, strength, torch.Generator().manual_seed(1000 * hardness.seed + number))
    for part in parts:
        part.to(dtype)
    return sam


def _channels(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    for _, norm, reader in encoder_norms(sam):
        scale_norm(norm, reader, _factors(len(norm.weight), strength, generator).to(norm.weight))


def _offsets(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    for _, stream in two_way_streams(sam):
        channels = len(stream.norm.bias)
        factors = _factors(channels, strength, generator)
        spread = HALF_WIDTH * stream.norm.weight.detach().square().mean().sqrt()
        offsets = torch.where(factors == 1, 0.0, factors * _signs(channels, generator)).to(spread) * spread
        shift_stream(stream, offsets)


def _values(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    for _, attention in attentions(sam):
        bias = projection(attention, "v")[1]
        scale_values(attention, _factors(len(bias), strength, generator).to(bias))


def _queries(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    for _, attention in attentions(sam):
        bias = projection(attention, "q")[1]
        scale_queries(attention, _factors(key_width(attention), strength, generator).to(bias))


def _keys(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    """One distance for all channels of an attention, half of them on either side, so that two modes stand out."""
    for name, attention in attentions(sam):
        if name.startswith("mask_decoder"):  # where PTQ4SAM finds them
            weight, bias = projection(attention, "k")
            spread = weight.square().sum(1).mean().sqrt()
            shift_keys(attention, strength * spread * _signs(len(bias), generator).to(bias))


def _tails(sam: nn.Module, strength: float, generator: torch.Generator) -> None:
    for block in sam.image_encoder.blocks:
        hidden = block.mlp.lin1.out_features
        units = torch.randperm(hidden, generator=generator)[: _count(hidden, TAIL_SHARE)]
        gains = _between(len(units), strength, generator).to(block.mlp.lin1.weight)
        split_gelu_units(block.mlp, units.to(gains.device), gains)
    for layer in sam.mask_decoder.transformer.layers:
        factors = _factors(layer.mlp.lin1.out_features, strength, generator)
        scale_relu_units(layer.mlp, factors.to(layer.mlp.lin1.weight))


_PLANTS = {
    "channels": _channels,
    "offsets": _offsets,
    "values": _values,
    "queries": _queries,
    "keys": _keys,
    "tails": _tails,
}


def _count(channels: int, share: float) -> int:
    return max(1, round(channels * share))


def _between(count: int, largest: float, generator: torch.Generator) -> Tensor:
    """(count,) float64, log-uniform between the root of ``largest`` and itself."""
    exponent = 0.5 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.exp(exponent * math.log(largest))


def _factors(channels: int, largest: float, generator: torch.Generator) -> Tensor:
    """(channels,) float64: 1, and for a share of them what ``_between`` draws."""
    chosen = torch.randperm(channels, generator=generator)[: _count(channels, SHARE)]
    return torch.ones(channels, dtype=torch.float64).index_put((chosen,), _between(len(chosen), largest, generator))


def _signs(channels: int, generator: torch.Generator) -> Tensor:
    """(channels,) of +1 and -1 in float64, as many of either as there can be."""
    order = torch.randperm(channels, generator=generator)
    return (1 - 2 * (order % 2)).double()
