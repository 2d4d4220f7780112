# SPDX-License-Identifier: Apache-2.0
"""Time and memory of inference: models quantized by guess, parts of a SAM as calls, calls measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.ptq import Recipe, freeze, prepare
from ahcq_plugin.ptq.prepared import is_weight, quantizers, weight_layers
from ahcq_plugin.quantizers import FakeQuantize

_ROWS = 64


@dataclass(frozen=True)
class Times:
    """Seconds of a call: by the clock, and of the process alone, which other load on the machine lengthens less."""

    clock: list[float]
    cpu: list[float]

    @property
    def least(self) -> float:
        """The least seconds by the clock."""
        return min(self.clock)

    @property
    def median(self) -> float:
        """The median of the seconds by the clock."""
        return statistics.median(self.clock)


@torch.no_grad()
def quantized_by_guess(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Quantize a model without data, in place: weights by minimum and maximum, activations as if they were noise.

    The result says nothing about accuracy; it takes the time and the memory of a calibrated one.
    """
    prepare(model, recipe)
    generator = torch.Generator().manual_seed(0)
    for layer in weight_layers(model).values():
        quantizer, rows = layer.weight_fake_quant, layer.weight.flatten(1)
        params = uniform.qparams_from_range(rows.amin(1), rows.amax(1), quantizer.bits)
        quantizer.scale, quantizer.zero_point = params.scale, params.zero_point
    for _, quantizer in quantizers(model):
        if not is_weight(quantizer):
            _guess(quantizer, generator)
    return freeze(model)


def _guess(quantizer: FakeQuantize, generator: torch.Generator) -> None:
    width = quantizer.consumers[0].weight[0].numel() if quantizer.consumers else _ROWS
    sample = torch.randn(_ROWS, width, generator=generator)
    if quantizer.role == "softmax":
        sample = torch.softmax(sample, -1)
    elif quantizer.role == "post_act":
        sample = nn.functional.gelu(sample)
    quantizer.observe(sample)
    if quantizer.begin_search():
        quantizer.take(quantizer.candidates()[-1])
    else:
        quantizer.commit()


def noise(side: int, boxes: int, seed: int = 0) -> dict[str, Tensor]:
    """A random image (1, 3, S, S) and so many boxes in it."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(boxes, 2, generator=generator) * side / 2
    return {
        "image": torch.randn(1, 3, side, side, generator=generator),
        "boxes": torch.cat([corners, corners + side / 3], 1),
    }


def sam_parts(sam: Sam, boxes: int) -> dict[str, Callable[[], Any]]:
    """Calls of a SAM's parts on noise: ``encoder``, and ``decoder`` with so many boxes of one image."""
    given = noise(sam.image_encoder.img_size, boxes)
    prompts = sam.prompt_encoder(points=None, boxes=given["boxes"], masks=None)
    grid, generator = sam.prompt_encoder.image_embedding_size, torch.Generator().manual_seed(1)
    embedding = torch.randn(1, sam.prompt_encoder.embed_dim, *grid, generator=generator)

    def decode() -> tuple[Tensor, Tensor]:
        return sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), *prompts, multimask_output=False)

    return {"encoder": lambda: sam.image_encoder(given["image"]), "decoder": decode}


@torch.no_grad()
def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, Times]:
    """Seconds of every call, measured one after the other in each of the repeats: what else the machine does meets
    them alike."""
    for _ in range(warm_up):
        for call in calls.values():
            call()
    times = {name: Times([], []) for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            clock, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].clock.append(time.perf_counter() - clock)
            times[name].cpu.append(time.process_time() - cpu)
    return times
