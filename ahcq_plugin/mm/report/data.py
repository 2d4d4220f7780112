# SPDX-License-Identifier: Apache-2.0
"""What a run hands to its HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.image_evaluation import Evaluation
from ahcq_plugin.mm.evaluation.records import ImageRecord
from ahcq_plugin.mm.report.videos import SampleVideo
from ahcq_plugin.ptq.distributions import Distribution

MAX_SAMPLES = 6
MAX_MASKS = 8


@dataclass(frozen=True)
class SampleImage:
    """One image of the report with its masks, all prompted with the same ground-truth boxes.

    Args:
        image: uint8 (H, W, 3) RGB.
        boxes: float32 (N, 4) xyxy in pixels.
        truth, floating, quantized: bool (N, H, W), masks of the i-th box.
    """

    img_id: int | str
    image: np.ndarray
    boxes: np.ndarray
    truth: np.ndarray
    floating: np.ndarray
    quantized: np.ndarray


@dataclass(frozen=True)
class ReportData:
    """Content of the report.

    Args:
        metrics: what ``metrics.json`` holds.
        units: rows of ``QuantReport.units`` (name, error_before, error_after, iterations, seconds).
        roles: rows of ``QuantReport.roles`` (unit, node, role, quantizer).
        audit: ``AuditReport.to_dict()``.
        config_text: the config as it ran.
        conditions: rows of ``QuantReport.conditions`` (layer, before, after).
        samples: up to :data:`MAX_SAMPLES` images.
        videos: some videos with their masks, in place of images.
        distributions: every quantizer's error, histograms of some, from ``collect_distributions``.
    """

    metrics: dict[str, Any]
    units: list[dict[str, Any]]
    roles: list[dict[str, Any]]
    audit: dict[str, Any]
    config_text: str
    conditions: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SampleImage] = field(default_factory=list)
    videos: list[SampleVideo] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)


def sample_images(records: Sequence[ImageRecord], floating: Evaluation, quantized: Evaluation) -> list[SampleImage]:
    """Images spread evenly over those with objects; of each the :data:`MAX_MASKS` largest objects."""
    usable = [record for record in records if len(record.truth)]
    step = max(1, len(usable) // MAX_SAMPLES)
    samples = []
    for record in usable[::step][:MAX_SAMPLES]:
        truth = masks.decode(record.truth_masks(), record.size)
        largest = np.sort(np.argsort(-truth.sum((1, 2)), kind="stable")[:MAX_MASKS])
        predicted = [
            masks.decode([evaluation.truth_masks[record.img_id][i] for i in largest], record.size)
            for evaluation in (floating, quantized)
        ]
        boxes = record.truth.boxes.numpy()[largest]
        samples.append(SampleImage(record.img_id, record.read(), boxes, truth[largest], *predicted))
    return samples
