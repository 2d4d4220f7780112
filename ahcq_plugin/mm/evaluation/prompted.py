# SPDX-License-Identifier: Apache-2.0
"""Masks of annotated objects by kind of prompt: the clicks of users, and mask inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM, ImageEmbedding
from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.records import ImageRecord
from ahcq_plugin.zoo.prompts import CLICKS, draw_clicks, foreground


def check_kinds(kinds: Any) -> tuple[str, ...]:
    """``test_cfg.eval_prompts`` as a tuple of different kinds. Raises ValueError: not a list of known kinds."""
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise ValueError(f"eval_prompts must be a list of kinds of prompts, got {kinds!r}")
    unknown = [repr(kind) for kind in kinds if kind not in list(CLICKS)]
    if unknown:
        raise ValueError(
            f"eval_prompts: unknown kind {', '.join(unknown)}; allowed: {', '.join(CLICKS)} (boxes are always "
            "measured; everything mode has the key `everything`)"
        )
    return tuple(dict.fromkeys(kinds))


def segment_prompted(
    model: BoxPromptedSAM, embedding: ImageEmbedding, record: ImageRecord, kinds: Sequence[str]
) -> dict[str, list[masks.RLE]]:
    """Kind -> a mask of each annotated object.

    Clicks depend on the image's id alone, so that all models get the same; ``click1`` and ``mask`` have the first of
    ``click3``. Kind ``mask`` gives a model the logits of its own first answer back, as ``SamPredictor`` is used.
    """
    seed = int.from_bytes(hashlib.sha256(repr(record.img_id).encode()).digest()[:7], "big")
    drawn = draw_clicks(
        max(CLICKS.values()),
        record.truth.boxes,
        record.size,
        record.object_masks(),
        torch.Generator().manual_seed(seed),
    )
    return {
        kind: [
            rle
            for part, _ in model.decode_prompts(embedding, foreground(drawn[:, : CLICKS[kind]]), kind == "mask")
            for rle in masks.encode(part)
        ]
        for kind in kinds
    }
