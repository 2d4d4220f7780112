# SPDX-License-Identifier: Apache-2.0
"""What it costs to calibrate with other prompts than those that are used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.zoo.items import Item
from ahcq_plugin.zoo.prompts import KINDS, assign_kinds, draw_item, item_generator, mixed_items, prompt_forward
from ahcq_plugin.zoo.sam import decode_prompts

#: Seed of the prompts that are compared; those of calibration have others.
HELD_OUT_SEED = 2**20


@torch.no_grad()
def prompt_errors(
    sam: Sam,
    mixes: Mapping[str, Mapping[str, float]],
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    recipe: Recipe,
    most: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Quantize ``sam`` once a mix, each time from floating point; compare mask logits for the same prompts.

    Args:
        mixes: name -> shares of prompts to calibrate with, see :func:`ahcq_plugin.zoo.prompts.mixed_items`.
        calibration, held_out: images for the quantizers and for the comparison.
        most: objects, or points of the grid, an image.

    Returns: name -> kind of prompt -> ||logits - fp|| / ||fp|| over all objects of ``held_out``.
    Raises:
        AuditError: a quantized model fails its audit.
        ValueError: too few images for a mix; before anything is computed.
    """
    for shares in mixes.values():
        assign_kinds(shares, len(calibration), seed)
    prompts = [
        {
            kind: draw_item(sam, item.image, torch.from_numpy(item.boxes), item.masks, kind, most, _generator(index))
            for kind in KINDS
        }
        for index, item in enumerate(held_out)
    ]
    expected = []
    for by_kind in prompts:
        embedding = sam.image_encoder(by_kind["box"]["image"])
        by_kind["mask"]["masks"] = decode_prompts(sam, embedding, by_kind["mask"])[0]
        expected.append(_logits(sam, by_kind))
    errors = {}
    for name, shares in mixes.items():
        batches = mixed_items(sam, calibration, shares, most, seed)
        with torch.enable_grad():
            quantized, _ = quantize(sam, batches, recipe, forward=prompt_forward)
        totals = {kind: [0.0, 0.0] for kind in KINDS}
        for by_kind, reference in zip(prompts, expected, strict=True):
            for kind, logits in _logits(quantized, by_kind).items():
                totals[kind][0] += float((logits - reference[kind]).square().sum())
                totals[kind][1] += float(reference[kind].square().sum())
        errors[name] = {kind: math.sqrt(apart / power) for kind, (apart, power) in totals.items()}
    return errors


def _generator(index: int) -> torch.Generator:
    return item_generator(HELD_OUT_SEED, index)


def _logits(sam: Sam, by_kind: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    embedding = sam.image_encoder(by_kind["box"]["image"])
    return {kind: decode_prompts(sam, embedding, prompt)[0] for kind, prompt in by_kind.items()}
