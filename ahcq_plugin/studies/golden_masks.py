# SPDX-License-Identifier: Apache-2.0
"""Masks of a quantized SAM by several ways to compute it: beside PyTorch's, beside each other's, and to the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from ahcq_plugin.export import Spec
from ahcq_plugin.export.compare import golden_forward, mask_overlap, table_softmax_forward
from ahcq_plugin.export.interpret_softmax import SoftmaxRow
from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.zoo.items import Item
from ahcq_plugin.zoo.predict import full_masks, make_batch
from ahcq_plugin.zoo.sam import box_forward

NUDGE = 1 + 2**-22  # changes the last bit of the image
PYTORCH, GOLDEN, TABLES = "PyTorch", "golden model", "golden model, softmax on tables"

#: From a batch to (logits (N, 1, h, w), ...).
Run = Callable[[dict[str, Tensor]], Any]


@dataclass
class MaskRow:
    """One way to compute, over all objects.

    Attributes:
        to_pytorch, to_golden: IoU of each object's mask to that of PyTorch and to that of the golden model.
        flipped: pixels of the logits' masks that are not PyTorch's.
        truth: IoU of each object's mask, at the size of the image, to the true one.
    """

    to_pytorch: list[float] = field(default_factory=list)
    to_golden: list[float] = field(default_factory=list)
    truth: list[float] = field(default_factory=list)
    flipped: int = 0


def golden_runs(model: Sam, spec: Spec, softmaxes: list[dict[tuple[str, str], SoftmaxRow]]) -> dict[str, Run]:
    """PyTorch and the golden model, both also with the last bit of the image changed, and softmax on tables.

    Args:
        softmaxes: gets the rows of ``table_softmax_forward`` of every batch.
    """

    def on_tables(batch: dict[str, Tensor]) -> Any:
        out, rows = table_softmax_forward(model, spec, batch, box_forward)
        softmaxes.append(rows)
        return out

    def nudged(run: Run) -> Run:
        return lambda batch: run({**batch, "image": batch["image"] * NUDGE})

    runs: dict[str, Run] = {
        PYTORCH: lambda batch: box_forward(model, batch),
        GOLDEN: lambda batch: golden_forward(model, spec, batch, box_forward),
        TABLES: on_tables,
    }
    return runs | {f"{name}, last bit of the image changed": nudged(runs[name]) for name in (PYTORCH, GOLDEN)}


@torch.no_grad()
def mask_rows(model: Sam, items: Sequence[Item], runs: Mapping[str, Run], boxes: int) -> dict[str, MaskRow]:
    """A row for each of ``runs``, which have ``PYTORCH`` and ``GOLDEN``, with at most ``boxes`` objects an item."""
    rows = {name: MaskRow() for name in runs}
    for item in items:
        batch = make_batch(model, item.image, item.boxes[:boxes])
        logits = {name: run(batch)[0] for name, run in runs.items()}
        for name, row in rows.items():
            overlap, flipped = mask_overlap(logits[PYTORCH], logits[name])
            row.to_pytorch += overlap.tolist()
            row.to_golden += mask_overlap(logits[GOLDEN], logits[name])[0].tolist()
            row.flipped += flipped
            masks = full_masks(model, logits[name], item.image.shape[:2])
            row.truth += [float(mask_iou(a, b)) for a, b in zip(masks, item.masks[:boxes], strict=True)]
    return rows


def softmax_total(softmaxes: Sequence[Mapping[tuple[str, str], SoftmaxRow]]) -> SoftmaxRow:
    """All softmaxes of all batches together; ``reason`` names those that stayed in floating point."""
    whole = SoftmaxRow()
    reasons: dict[str, None] = {}
    for rows in softmaxes:
        for (unit, name), row in rows.items():
            whole.codes += row.codes
            whole.differing += row.differing
            whole.further += row.further
            if row.reason:
                reasons[f"{unit}.{name}: {row.reason}"] = None
    whole.reason = "; ".join(reasons)
    return whole
