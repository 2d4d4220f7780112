# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of SAM 2 on videos: the same run as on images, with clips and J&F."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmdet.registry import DATASETS
from mmengine.registry import LOOPS
from torch import Tensor, nn

from ahcq_plugin.mm.box_prompted_sam import build_sam_from_config
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.mm.evaluation.video_evaluation import VideoEvaluation, evaluate_videos
from ahcq_plugin.mm.quantization_loop import CalibrationOptions, QuantizationLoop
from ahcq_plugin.mm.report.videos import sample_videos
from ahcq_plugin.support.digest import digest
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.segment import prepare_frames
from ahcq_plugin.zoo.track import clip_forward
from ahcq_plugin.zoo.videos import Video


@dataclass(frozen=True)
class VideoCalibration(CalibrationOptions):
    """Which clips calibrate.

    Args:
        dataset: config of a data set of videos.
        num_videos, num_frames: videos, and first frames of each.
        max_objects: the largest objects of the first frame that are followed.
        seed: of the choice of videos.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("num_videos", "num_frames", "max_objects")

    dataset: Mapping[str, Any] | None = None
    num_videos: int = 8
    num_frames: int = 4
    max_objects: int = 3
    seed: int = 0


class VideoModel(nn.Module):
    """Holds the SAM 2 of a run as ``sam``."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.sam = sam

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.sam.parameters()).device


class CalibrationClips(Sequence):
    """Calibration items for ``clip_forward``, read when asked for."""

    def __init__(self, videos: Sequence[Video], size: int, num_frames: int, max_objects: int):
        self._videos, self._size, self._num_frames, self._max_objects = videos, size, num_frames, max_objects

    def __len__(self) -> int:
        return len(self._videos)

    @property
    def names(self) -> list[str]:
        """Of the videos, in their order."""
        return [video.name for video in self._videos]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        video = self._videos[index]
        images = (video.image(t) for t in range(min(self._num_frames, len(video.frames))))
        first = torch.from_numpy(video.masks(0))
        areas = first.flatten(1).sum(1)
        largest = areas.argsort(descending=True, stable=True)[: self._max_objects]
        return {"frames": prepare_frames(images, self._size), "masks": first[largest[areas[largest] > 0]]}


@LOOPS.register_module()
class VideoPTQLoop(QuantizationLoop):
    """A run on videos, see :class:`QuantizationLoop`. Figures are those of :class:`JFMetric`.

    Args:
        evaluator: given by the Runner; its JFMetric measures.
        sam: ``dict(name=..., checkpoint=...)`` of :func:`ahcq_plugin.zoo.sam2.build_sam2`.
        calib: keys of :class:`VideoCalibration`.
        recipe, units, toolkit, cache_dir, device, resume: see :class:`QuantizationLoop`.
    """

    forward = staticmethod(clip_forward)
    measured = VideoEvaluation

    def __init__(
        self,
        runner,
        dataloader,
        evaluator,
        sam: Mapping[str, Any] | None = None,
        recipe: str | Mapping[str, Any] | None = None,
        calib: Mapping[str, Any] | None = None,
        units: Any = None,
        toolkit: str = "native",
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader, sam, recipe, units, toolkit, cache_dir, device, resume)
        if self.workers.size > 1:
            raise RuntimeError(
                f"VideoPTQLoop runs in one process, got {self.workers.size}: start it without a launcher"
            )
        self.calib = VideoCalibration.from_config(calib)
        evaluator = runner.build_evaluator(evaluator)
        self.metric = next((metric for metric in evaluator.metrics if isinstance(metric, JFMetric)), None)
        if self.metric is None:
            raise ValueError("VideoPTQLoop measures with a JFMetric: give test_evaluator = dict(type='JFMetric')")

    def wrap(self, model: nn.Module) -> VideoModel:
        """A SAM 2; the Runner's model only stands in for one."""
        return VideoModel(build_sam_from_config(self.sam_config, build_sam2))

    def read(self, model: VideoModel) -> list[Video]:
        """The videos."""
        dataset = self.dataloader.dataset
        return [dataset[index] for index in range(len(dataset))]

    def calibration(self, model: VideoModel) -> CalibrationClips:
        """First frames of some videos that show an object there."""
        calib = self.calib
        if calib.dataset is None:
            raise ValueError("VideoPTQLoop: no calibration videos; give `calib.dataset`")
        dataset = DATASETS.build(dict(calib.dataset))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(calib.seed)).tolist()
        videos = [video for video in (dataset[index] for index in order) if video.masks(0).any()][: calib.num_videos]
        if len(videos) < calib.num_videos:
            raise ValueError(
                f"calib: `num_videos` is {calib.num_videos}, but only {len(videos)} of {len(dataset)} calibration "
                "videos have an object in the first frame; lower it or give more videos"
            )
        return CalibrationClips(videos, model.sam.image_size, calib.num_frames, calib.max_objects)

    def evaluate(self, model, records, reference: VideoEvaluation | None, desc: str) -> VideoEvaluation:
        """J&F, and the distance to the reference's masks."""
        return evaluate_videos(model.sam, records, self.metric, reference, desc)

    def identity(self, model: VideoModel, records: Sequence[Video]) -> list[Any]:
        """Place, frames and annotations."""
        files = [
            [video.name, video.layout, [digest(path.read_bytes()) for path in video.frames]]
            + [digest(video.masks(index)) for index in video.annotated]
            for video in records
        ]
        return [model.device.type, torch.__version__, self.metric.skip_ends, files]

    def pictures(self, records, floating: VideoEvaluation, quantized: VideoEvaluation) -> dict[str, list[Any]]:
        """Strips and moving pictures of some videos."""
        return {"videos": sample_videos(records, floating, quantized)}

    def notes(self, items: CalibrationClips) -> dict[str, Any]:
        """Names of the videos."""
        return {"calibration_videos": items.names}

    def details(self, floating: VideoEvaluation, quantized: VideoEvaluation) -> dict[str, Any]:
        """Figures of each video, and speed."""
        rows = {name: {"fp": row, "quantized": quantized.sequences[name]} for name, row in floating.sequences.items()}
        speed = {"fp": floating.seconds_per_frame, "quantized": quantized.seconds_per_frame}
        return {"sequences": rows, "seconds_per_frame": speed}
