# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of SAM 2 on videos: the same run as on images, with clips and J&F."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import LOOPS
from torch import Tensor, nn

from ahcq_plugin.mm import dry_run
from ahcq_plugin.mm.box_prompted_sam import build_sam_from_config
from ahcq_plugin.mm.checks import DRY_RUN
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.mm.evaluation.video_evaluation import VideoEvaluation, evaluate_videos
from ahcq_plugin.mm.options import CalibrationOptions
from ahcq_plugin.mm.quantization_loop import QuantizationLoop
from ahcq_plugin.mm.report.videos import sample_videos
from ahcq_plugin.ptq.loss import mask_error
from ahcq_plugin.support.batches import blaming
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

    num_videos: int = 8
    num_frames: int = 4
    max_objects: int = 3


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
    """A run on videos, see :class:`QuantizationLoop`. Figures are those of :class:`JFMetric`; the config's ``sam`` is
    for :func:`ahcq_plugin.zoo.sam2.build_sam2`.

    Args:
        evaluator: given by the Runner; its JFMetric measures.
        calib: keys of :class:`VideoCalibration`.
        units, leave, toolkit, cache_dir, device, resume: see :class:`QuantizationLoop`.
    """

    build = staticmethod(build_sam2)
    forward = staticmethod(clip_forward)
    loss = staticmethod(mask_error)
    measured = VideoEvaluation

    def __init__(
        self,
        runner,
        dataloader,
        evaluator,
        calib: Mapping[str, Any] | None = None,
        units: Any = None,
        leave: Sequence[str] = (),
        toolkit: str = "native",
        cache_dir: str | None = None,
        device: str | None = None,
        resume: bool = False,
    ):
        super().__init__(runner, dataloader, units, leave, toolkit, cache_dir, device, resume)
        if self.workers.size > 1:
            raise ValueError(f"VideoPTQLoop runs in one process, got {self.workers.size}: start it without a launcher")
        self.calib = VideoCalibration.from_config(calib)
        evaluator = runner.build_evaluator(evaluator)
        self.metric = next((metric for metric in evaluator.metrics if isinstance(metric, JFMetric)), None)
        if self.metric is None:
            raise ValueError("VideoPTQLoop measures with a JFMetric: give test_evaluator = dict(type='JFMetric')")

    @classmethod
    def check_options(cls, loop: Mapping[str, Any]) -> None:
        """Calibration."""
        VideoCalibration.from_config(loop.get("calib"))

    @classmethod
    def check_data(cls, cfg: Config, random_weights: bool) -> None:
        """Both data sets are there and have frames that can be read and measured; the model only stands in and has no
        weights."""
        calib = VideoCalibration.from_config(cfg.test_cfg.get("calib"))
        _check_kinds(cfg)
        for config in (cfg.test_dataloader.dataset, _calibration_data(calib)):
            try:
                with blaming("a data set of the config does not build"):
                    dataset = DATASETS.build(dict(config))
            except FileNotFoundError as error:
                where = f": {cfg.data_source}" if "data_source" in cfg else ""
                raise FileNotFoundError(f"{error}{where}; {DRY_RUN}") from error
            for index in range(len(dataset)):
                dataset[index].check()
                if config is cfg.test_dataloader.dataset and not _measured(cfg, dataset[index]):
                    raise ValueError(
                        f"video {dataset[index].name}: no annotated frame is left to measure, the first and the last "
                        "one do not count"
                    )

    @classmethod
    def cut_down(cls, cfg: Config) -> list[str]:
        """Generated clips; the SAM 2 keeps its width and depth, its input is small."""
        _check_kinds(cfg)
        root = str(Path(cfg.work_dir) / "clips")
        dataset = dict(
            type="GeneratedClips", data_root=root, count=dry_run.IMAGES, frames=dry_run.FRAMES, size=dry_run.IMAGE_SIZE
        )
        cfg.test_dataloader["dataset"] = dataset
        cfg.test_cfg["calib"] = dict(
            dataset=dataset, num_videos=dry_run.IMAGES, num_frames=2, max_objects=dry_run.BOXES
        )
        sam = dry_run.small_sam2(cfg.sam["name"])
        cfg.sam = dict(name=sam, checkpoint=False)
        return [
            f"{dry_run.IMAGES} generated clips of {dry_run.FRAMES} frames of {dry_run.IMAGE_SIZE} pixels, "
            f"{dry_run.ITERATIONS} iterations a unit, random weights",
            f"SAM 2's input is {sam['image_size']} pixels",
        ]

    def wrap(self, model: nn.Module) -> VideoModel:
        """A SAM 2; the Runner's model only stands in for one."""
        return VideoModel(build_sam_from_config(self.sam_config, self.build))

    def read(self, model: VideoModel) -> list[Video]:
        """The videos."""
        dataset = self.dataloader.dataset
        videos = [dataset[index] for index in range(len(dataset))]
        for video in videos:
            _ = video.annotated  # raises ValueError where the first frame has no annotation
        return videos

    def calibration(self, model: VideoModel, tune: bool) -> tuple[CalibrationClips, None]:
        """First frames of some videos that show an object there."""
        calib = self.calib
        dataset = DATASETS.build(dict(_calibration_data(calib)))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(calib.seed)).tolist()
        showing = (video for video in (dataset[index] for index in order) if video.masks(0).any())
        videos = list(islice(showing, calib.num_videos))
        if len(videos) < calib.num_videos:
            raise ValueError(
                f"calib: `num_videos` is {calib.num_videos}, but only {len(videos)} of {len(dataset)} calibration "
                "videos have an object in the first frame; lower it or give more videos"
            )
        return CalibrationClips(videos, model.sam.image_size, calib.num_frames, calib.max_objects), None

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


def _measured(cfg: Config, video: Video) -> bool:
    """Whether any frame of it is measured, see :class:`JFMetric`."""
    evaluator = cfg.get("test_evaluator")
    if isinstance(evaluator, Mapping) and evaluator.get("skip_ends", True):
        return bool(video.annotated[1:-1])
    return True


def _check_kinds(cfg: Config) -> None:
    """The data sets that the config names are known. Raises ValueError."""
    calib = cfg.test_cfg.get("calib") or {}
    for config in (cfg.test_dataloader.dataset, calib.get("dataset") or {"type": "VideoFolder"}):
        if DATASETS.get(config.get("type", "")) is None:
            raise ValueError(f"unknown data set {config.get('type')!r}: its module belongs into custom_imports")


def _calibration_data(calib: VideoCalibration) -> Mapping[str, Any]:
    if calib.dataset is None:
        raise ValueError("no calibration videos: give test_cfg.calib.dataset in the config")
    return calib.dataset
