# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a quantized SAM 2 beside PyTorch (masks) and beside the same SAM 2 in floating point (time)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export import export_onnx
from ahcq_plugin.export.compare import mask_overlap
from ahcq_plugin.export.onnx_sam2 import OnnxSam2
from ahcq_plugin.studies.inference.timing import in_turn
from ahcq_plugin.zoo.clips import render_clip
from ahcq_plugin.zoo.segment import prepare_frames
from ahcq_plugin.zoo.track import track

PARTS = ("image_encoder", "memory_attention", "memory_encoder", "mask_decoder")

#: Frames (T, H, W, 3) uint8 RGB and the masks of the first one (N, H, W) bool.
Clip = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of a graph's run, and of the same in floating point, in turn; ``ratio`` is of the medians."""

    least: float
    median: float
    floating_least: float
    floating_median: float

    @property
    def ratio(self) -> float:
        """How many times as fast as in floating point."""
        return self.floating_median / self.median


@dataclass(frozen=True)
class VideoParity:
    """One runtime, on one thread.

    Attributes:
        iou, least_iou: mean and least IoU of the masks to those of the fake-quantized model in PyTorch, over ``masks``:
            one for each object and frame behind the first.
        nudged_iou: mean IoU in PyTorch with itself, the last bit of the frames changed.
        parts: times by the names of ``PARTS``; of memory attention with as many memories as the clip fills.
        load: of the machine, average of a minute, at the end.
    """

    runtime: str
    iou: float
    least_iou: float
    nudged_iou: float
    masks: int
    parts: dict[str, PartTime]
    load: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ratios = {name: {**asdict(time), "ratio": time.ratio} for name, time in self.parts.items()}
        return {**asdict(self), "parts": ratios}

    def lines(self) -> list[str]:
        """Rows of a table in Markdown, one for each part."""
        return [
            f"| {self.runtime} | {self.iou:.3f} ({self.least_iou:.3f}) | {self.nudged_iou:.3f} | {name} | "
            f"{t.least:.1f} / {t.median:.1f} | {t.floating_least:.1f} / {t.floating_median:.1f} | {t.ratio:.2f} |"
            for name, t in self.parts.items()
        ]


TITLES = (
    "| runtime | IoU to PyTorch (least) | PyTorch, last bit changed | part | ms, least / median | FP32 | ratio |\n"
    "|---|---|---|---|---|---|---|"
)


def generated_clips(count: int, seed: int, size: int, frames: int = 8) -> list[Clip]:
    """Clips of ``zoo.clips`` with the masks of their first frames."""
    made = [render_clip((seed, index), frames, size) for index in range(count)]
    return [(images, masks[0]) for images, masks in made]


def measure_videos(
    qmodel: nn.Module,
    floating: nn.Module,
    folder: str | Path,
    clips: Sequence[Clip],
    runtimes: Sequence[str],
    runs: int = 7,
) -> list[VideoParity]:
    """Compare a folder that ``export_onnx`` wrote of ``qmodel`` with PyTorch, runtime by runtime.

    Args:
        qmodel: the fake-quantized model.
        floating: the same architecture without quantizers; its graphs are what times are compared with.
        clips: the last frame of the first one is timed.
        runs: timed pairs of runs, after one that is not.
    """
    prepared = [prepare_frames(images, qmodel.image_size) for images, _ in clips]
    wanted = [follow(qmodel, frames, clip[1]) for frames, clip in zip(prepared, clips, strict=True)]
    last_bit = [torch.nextafter(frames, frames + 1) for frames in prepared]
    nudged = [follow(qmodel, frames, clip[1]) for frames, clip in zip(last_bit, clips, strict=True)]
    own = float(overlaps_of(wanted, nudged).mean())
    with tempfile.TemporaryDirectory() as beside:
        export_onnx(floating, beside, style="float")
        return [_of_runtime(runtime, folder, beside, clips, wanted, own, runs) for runtime in runtimes]


def _of_runtime(
    runtime: str,
    folder: str | Path,
    beside: str,
    clips: Sequence[Clip],
    wanted: Sequence[Tensor],
    nudged: float,
    runs: int,
) -> VideoParity:
    sam, plain = (OnnxSam2(path, 1, runtime) for path in (folder, beside))
    inputs = {name: _noted(sam, name) for name in PARTS}
    found = [
        torch.from_numpy(np.stack([x for _, x in sam.track(list(images), masks)])) for images, masks in clips[::-1]
    ]
    overlaps = overlaps_of(wanted, found[::-1])
    parts = {}
    for name in PARTS:
        graphs = {which: getattr(one, name) for which, one in (("quantized", sam), ("floating", plain))}
        times = in_turn({which: lambda graph=graph, n=name: graph(inputs[n]) for which, graph in graphs.items()}, runs)
        parts[name] = PartTime(*(1e3 * x for time in times.values() for x in (time.least, time.median)))
    load = os.getloadavg()[0]
    return VideoParity(runtime, float(overlaps.mean()), float(overlaps.min()), nudged, len(overlaps), parts, load)


def _noted(sam: OnnxSam2, name: str) -> dict[str, np.ndarray]:
    """The inputs of a graph's latest run, from now on."""
    graph, latest = getattr(sam, name), dict[str, np.ndarray]()

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        latest.update(inputs)
        return graph(inputs)

    setattr(sam, name, run)
    return latest


@torch.inference_mode()
def follow(model: nn.Module, frames: Tensor, masks: np.ndarray) -> Tensor:
    """Logits (T, N, H, W)."""
    return torch.stack([logits for _, logits in track(model, frames, torch.from_numpy(masks))])


def overlaps_of(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """IoU of all masks of the frames behind the first, whose masks were given."""
    pairs = zip(wanted, found, strict=True)
    return torch.cat([mask_overlap(*(x[1:].flatten(0, 1)[:, None].cpu() for x in pair))[0] for pair in pairs])
