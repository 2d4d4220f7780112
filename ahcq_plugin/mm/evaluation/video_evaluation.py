# SPDX-License-Identifier: Apache-2.0
"""One pass over annotated videos: J&F by the official protocol, and the masks of the annotated frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.zoo.segment import segment_clip
from ahcq_plugin.zoo.videos import DAVIS, Video

#: (model, images, masks of the first frame, whether masks must not overlap) -> masks of every frame.
Segmenter = Callable[[nn.Module, Iterable[np.ndarray], np.ndarray, bool], Iterable[np.ndarray]]


@dataclass(frozen=True)
class VideoEvaluation:
    """Figures of a model and its masks.

    Args:
        metrics: ``J&F``, ``J``, ``F`` in [0, 1], means over objects; ``J_fp``: mean IoU with the reference's masks in
            the annotated frames after the first one.
        sequences: the first three for each video.
        seconds_per_frame: wall time of tracking all objects of a frame, mean over all frames.
        found: video -> masks of each annotated frame, those of its objects in their order.
    """

    metrics: dict[str, float]
    sequences: dict[str, dict[str, float]]
    seconds_per_frame: float
    found: dict[str, list[list[masks.RLE]]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> VideoEvaluation:
        """Inverse of :meth:`to_json`."""
        return VideoEvaluation(**content)


def evaluate_videos(
    model: nn.Module,
    videos: Sequence[Video],
    metric: JFMetric,
    reference: VideoEvaluation | None = None,
    desc: str = "evaluate",
    segment: Segmenter = segment_clip,
) -> VideoEvaluation:
    """Follow the objects of every video's first frame and measure.

    Args:
        model: a ``SAM2VideoPredictor``.
        metric: measures; what it held before is dropped.
        reference: evaluation whose masks ``J_fp`` is measured against.
        segment: called as ``segment_clip`` is.

    Raises:
        DataError: a video shows no object in its first frame, or nothing can be measured.
    """
    metric.results.clear()
    kept: dict[str, list[list[masks.RLE]]] = {}
    distances, seconds, frames = [], 0.0, 0
    with tqdm(total=sum(len(video.frames) for video in videos), desc=desc, unit="frame") as bar:
        for video in videos:
            start = time.perf_counter()
            annotated = set(video.annotated)
            first, frames_of_video = video.masks(0), (video.image(index) for index in range(len(video.frames)))
            if not first.any():
                raise DataError(f"video {video.name}: the first frame shows no object to follow")
            predicted = []
            for index, frame in enumerate(segment(model, frames_of_video, first, video.layout == DAVIS)):
                bar.update()
                if index in annotated:
                    predicted.append(frame)
            seconds, frames = seconds + time.perf_counter() - start, frames + len(video.frames)
            truth = np.stack([video.masks(index) for index in video.annotated])
            metric.process({}, [dict(name=video.name, objects=video.objects, masks=np.stack(predicted), truth=truth)])
            kept[video.name] = [masks.encode(torch.from_numpy(frame)) for frame in predicted]
            if reference is not None:
                for ours, theirs in zip(kept[video.name][1:], reference.found[video.name][1:], strict=True):
                    distances += masks.pairwise_iou(ours, theirs)
    sequences = metric.sequences()
    figures = metric.compute_metrics(metric.results)
    if reference is not None:
        figures["J_fp"] = sum(distances) / len(distances)
    return VideoEvaluation(figures, sequences, seconds / frames, kept)


def keep_first_masks(
    model: nn.Module, images: Iterable[np.ndarray], first_masks: np.ndarray, non_overlap: bool
) -> Iterable[np.ndarray]:
    """In place of ``segment_clip``: what a model that sees nothing would answer."""
    return (first_masks for _ in images)
