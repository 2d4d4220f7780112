# SPDX-License-Identifier: Apache-2.0
"""Frames a second, utilisation and roofline of whole models on an engine, by the cycle model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ahcq_plugin.export.matmul import signed_bits
from ahcq_plugin.export.operands import top
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.cycles import CLOCK_HZ, DDR, Cycles, cycles, softmax_cycles
from ahcq_plugin.hls.engine.launches import Launch, record_launches
from ahcq_plugin.hls.engine.softmax_command import ROW, Positions
from ahcq_plugin.ptq.recipe import Recipe

ENCODER = "image_encoder"


@dataclass(frozen=True)
class Total:
    """Of a sequence of commands, one after the other.

    Attributes:
        cycles, macs, ddr_bytes, limits: sums of those of ``cycles.Cycles``.
        config: of the engine.
    """

    cycles: int
    macs: int
    ddr_bytes: int
    limits: dict[str, int]
    config: EngineConfig

    @property
    def utilisation(self) -> float:
        """``M K N / (cycles * processing elements * inputs)``; all multiplications over all cycles."""
        return self.macs / (self.cycles * self.config.lanes)

    @property
    def per_second(self) -> float:
        """Items a second at 300 MHz, if the host keeps up."""
        return CLOCK_HZ / self.cycles

    @property
    def gmacs(self) -> float:
        """10^9 multiply-accumulates a second."""
        return self.macs * self.per_second / 1e9


@dataclass(frozen=True)
class LayerRow:
    """Launches of one shape together.

    Attributes:
        launch: the first of them.
        count: how many.
        one: the model of each.
        share: of all cycles.
    """

    launch: Launch
    count: int
    one: Cycles
    share: float

    def roof(self, config: EngineConfig, ddr: DDR) -> float:
        """10^9 MACs a second that cells and DDR allow: the roofline at this layer's MACs a byte."""
        peak = config.lanes * CLOCK_HZ
        return min(peak, self.one.macs / self.one.ddr_bytes * ddr.bytes_per_second) / 1e9


def total(launches: Sequence[Launch], config: EngineConfig, ddr: DDR | None = None) -> Total:
    """Everything in ``launches``, in turn."""
    parts = [cycles(launch.shape, config, launch.output, ddr) for launch in launches]
    limits: Counter[str] = Counter()
    for part in parts:
        limits.update(part.limits)
    whole, macs, ddr_bytes = (sum(getattr(part, name) for part in parts) for name in ("cycles", "macs", "ddr_bytes"))
    return Total(whole, macs, ddr_bytes, dict(limits), config)


def softmax_total(launches: Sequence[Launch], ddr: DDR | None = None, positions: bool = False) -> int:
    """Cycles of the softmax commands behind all Q.K^T, in turn with these; 0 where one of them does not fit.

    Args:
        positions: relative positions are added to the scores, as in SAM's encoders; keys are square pictures.
    """
    whole = 0
    for shape in (launch.shape for launch in launches if launch.shape.kind == "qk"):
        largest, side = shape.k * top(shape.left_bits) * top(shape.right_bits), math.isqrt(shape.n)
        if signed_bits(-largest, largest) > 16 or shape.n > ROW or (positions and side**2 != shape.n):
            return 0
        added = Positions(side, side, 0) if positions else None
        whole += softmax_cycles((shape.batch, shape.m, shape.n), shape.left_bits, 1, 1, ddr, added).cycles
    return whole


def by_layer(launches: Sequence[Launch], config: EngineConfig, ddr: DDR | None = None) -> list[LayerRow]:
    """Launches of equal shape and output together, those with the most cycles first."""
    kinds = Counter((launch.shape, launch.output) for launch in launches)
    first = {(launch.shape, launch.output): launch for launch in reversed(launches)}
    rows = [(first[kind], count, cycles(kind[0], config, kind[1], ddr)) for kind, count in kinds.items()]
    everything = sum(count * one.cycles for _, count, one in rows)
    rows.sort(key=lambda row: -row[1] * row[2].cycles)
    return [LayerRow(launch, count, one, count * one.cycles / everything) for launch, count, one in rows]


def sam_launches(name: str, boxes: Sequence[int], bits: int = 4) -> dict[str, list[Launch]]:
    """``encoder`` of a SAM at 1024 x 1024 by the recipe ``ahcq``, and ``decoder, N boxes`` for each number of boxes."""
    from ahcq_plugin.zoo.sam import box_forward, build_sam  # loads segment_anything

    def item(count: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(1, 3, 1024, 1024), "boxes": torch.zeros(count, 4)}

    items = [partial(item, count) for count in boxes]
    runs = [_parts(run) for run in record_launches(partial(build_sam, name, False), items, box_forward, _recipe(bits))]
    decoders = {f"decoder, {count} boxes": rest for count, (_, rest) in zip(boxes, runs, strict=True)}
    return {"encoder": runs[0][0], **decoders}


def sam2_launches(name: str, bits: int = 4) -> dict[str, list[Launch]]:
    """``encoder`` of a SAM 2 at 1024 x 1024, and ``rest`` of a frame with one object and one frame in memory.

    ``rest`` is memory attention, decoder, and what units the memory encoder has: what a second frame adds.
    """
    from ahcq_plugin.zoo.sam2 import build_sam2
    from ahcq_plugin.zoo.track import clip_forward

    def build() -> nn.Module:
        with torch.device("cpu"):  # its builder looks at numbers
            return build_sam2(name, False).to("meta")

    def clip(frames: int) -> dict[str, torch.Tensor]:
        return {"frames": torch.zeros(frames, 3, 1024, 1024), "masks": torch.zeros(1, 256, 256)}

    items = [partial(clip, frames) for frames in (2, 1)]
    two, one = (_parts(run) for run in record_launches(build, items, clip_forward, _recipe(bits)))
    return {"encoder": one[0], "rest": two[1][len(one[1]) :]}


def _recipe(bits: int) -> Recipe:
    return Recipe.from_config("ahcq", w_bits=bits, a_bits=bits)


def _parts(launches: Sequence[Launch]) -> tuple[list[Launch], list[Launch]]:
    """Those of the encoder, and the others."""
    encoder = [launch for launch in launches if launch.unit.startswith(ENCODER)]
    return encoder, [launch for launch in launches if not launch.unit.startswith(ENCODER)]
