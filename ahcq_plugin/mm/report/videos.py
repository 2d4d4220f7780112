# SPDX-License-Identifier: Apache-2.0
"""Videos of the report: strips of five frames and a moving picture, each with truth, FP and quantized masks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.video_evaluation import VideoEvaluation
from ahcq_plugin.mm.report import images as report_images
from ahcq_plugin.zoo.videos import Video

MAX_VIDEOS = 6
#: Width of a frame in strips and moving pictures, pixels; frames of the latter, and how long each is shown.
WIDTH, GIF_WIDTH, GIF_FRAMES, GIF_MILLISECONDS = 232, 200, 40, 160
ROWS = ("ground truth", "FP", "quantized")


@dataclass(frozen=True)
class SampleVideo:
    """One video of the report.

    Args:
        columns: indices of the frames in the strips: the first, at 1/4, 1/2 and 3/4, the last annotated one.
        strips: name in :data:`ROWS` -> uint8 (h, 5 w, 3) RGB.
        gif: moving picture of the three side by side.
    """

    name: str
    columns: list[int]
    strips: dict[str, np.ndarray]
    gif: bytes


def sample_videos(videos: Sequence[Video], floating: VideoEvaluation, quantized: VideoEvaluation) -> list[SampleVideo]:
    """Up to :data:`MAX_VIDEOS` videos, spread evenly."""
    step = max(1, len(videos) // MAX_VIDEOS)
    return [_sample(v, floating.found[v.name], quantized.found[v.name]) for v in videos[::step][:MAX_VIDEOS]]


def _sample(video: Video, floating: list[list[masks.RLE]], quantized: list[list[masks.RLE]]) -> SampleVideo:
    last = len(video.annotated) - 1
    positions = [round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)]

    def drawn(position: int, width: int) -> list[np.ndarray]:
        image, truth = video.image(video.annotated[position]), video.masks(video.annotated[position])
        predicted = [masks.decode(rles[position], truth.shape[1:]) for rles in (floating, quantized)]
        return [_draw(image, part, width) for part in (truth, *predicted)]

    columns = list(zip(*(drawn(position, WIDTH) for position in positions), strict=True))
    strips = {name: np.concatenate(row, 1) for name, row in zip(ROWS, columns, strict=True)}
    shown = range(0, last + 1, max(1, -(-(last + 1) // GIF_FRAMES)))
    gif = encode_gif([np.concatenate(drawn(position, GIF_WIDTH), 1) for position in shown])
    return SampleVideo(video.name, [video.annotated[position] for position in positions], strips, gif)


def _draw(image: np.ndarray, objects: np.ndarray, width: int) -> np.ndarray:
    """Masks (N, H, W) over a frame that is ``width`` pixels wide."""
    size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    scaled = [cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR) > 127 for mask in objects]
    return report_images.draw_masks(small, np.stack(scaled) if scaled else np.zeros((0, *small.shape[:2]), bool))


def encode_gif(frames: Sequence[np.ndarray]) -> bytes:
    """Endless GIF of uint8 (H, W, 3) RGB frames, 64 colours each."""
    pages = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    stream = io.BytesIO()
    pages[0].save(stream, "GIF", save_all=True, append_images=pages[1:], duration=GIF_MILLISECONDS, loop=0)
    return stream.getvalue()
