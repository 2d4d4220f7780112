# SPDX-License-Identifier: Apache-2.0
"""Time, memory, size and masks of every way to run a SAM, each beside FP32 PyTorch in pairs of calls."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.studies.inference.artefacts import Subject, lacking
from ahcq_plugin.studies.inference.variants import BASE, Variant
from ahcq_plugin.studies.inference.workers import Worker, WorkerError

#: Scenes whose masks are compared; calibration has seen others.
MASK_SEED = 7


@dataclass(frozen=True)
class Part:
    """Of one way: the encoder (0 boxes), or the decoder with so many.

    Attributes:
        least, median: milliseconds.
        ratio: FP32 PyTorch's time by this one, median of pairs that were measured one behind the other.
        peak: bytes that the process grows to, beyond those before the model was opened.
    """

    boxes: int
    least: float
    median: float
    ratio: float
    peak: int


@dataclass(frozen=True)
class Row:
    """One way.

    Attributes:
        parts: none where it does not run, ``error`` says why.
        bytes: of its files.
        iou: mean IoU of its masks to FP32 PyTorch's over ``masks``; None for a model that is not trained.
        load: of the machine, average of a minute, at the end.
    """

    runtime: str
    computes: str
    parts: tuple[Part, ...]
    bytes: int
    iou: float | None = None
    masks: int = 0
    load: float = 0.0
    error: str = ""


def measure(
    subject: Subject,
    folder: Path,
    variants: Sequence[Variant],
    boxes: Sequence[int],
    repeats: int,
    threads: int = 1,
    images: int = 32,
) -> Iterator[Row]:
    """Measure ways one after the other, each in a process of its own beside one that holds FP32 PyTorch.

    Args:
        folder: the artefacts of ``subject``.
        boxes: of the decoder.
        repeats: pairs of calls of each part, after one that is not measured.
        images: scenes whose masks are compared, of a trained model.
    """
    base = Worker(BASE.name, subject, folder, threads)
    try:
        wanted = base.ask("masks", images, MASK_SEED) if subject.trained else None
        for variant in variants:
            yield _row(variant, base, subject, folder, (0, *boxes), repeats, threads, wanted)
    finally:
        base.close()


def _row(
    variant: Variant,
    base: Worker,
    subject: Subject,
    folder: Path,
    parts: Sequence[int],
    repeats: int,
    threads: int,
    wanted: list[np.ndarray] | None,
) -> Row:
    if not (folder / variant.files).exists():
        why = f"{variant.files} is not made: pip install {' '.join(lacking(variant.files))}"
        return Row(variant.runtime, variant.computes, (), 0, error=why)
    size = variant.bytes(folder)
    try:
        worker = Worker(variant.name, subject, folder, threads)
    except WorkerError as error:
        return Row(variant.runtime, variant.computes, (), size, error=str(error))
    try:
        measured = tuple(_part(worker, base, boxes, repeats) for boxes in parts)
        overlap = None if wanted is None else _overlap(wanted, worker.ask("masks", len(wanted), MASK_SEED))
    except WorkerError as error:
        return Row(variant.runtime, variant.computes, (), size, error=str(error))
    finally:
        worker.close()
    iou, masks = (None, 0) if overlap is None else (float(overlap.mean()), len(overlap))
    return Row(variant.runtime, variant.computes, measured, size, iou, masks, os.getloadavg()[0])


def _part(worker: Worker, base: Worker, boxes: int, repeats: int) -> Part:
    def pair() -> tuple[Any, Any]:
        return base.ask("seconds", boxes), worker.ask("seconds", boxes)

    pair()
    pairs = [pair() for _ in range(repeats)]
    own = [1e3 * mine for _, mine in pairs]
    ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    return Part(boxes, min(own), statistics.median(own), ratio, worker.ask("peak", boxes))


def _overlap(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> np.ndarray:
    """IoU of each pair of masks of all images."""
    return np.concatenate([mask_iou(a, b) for a, b in zip(wanted, found, strict=True)])
