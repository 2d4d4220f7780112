# SPDX-License-Identifier: Apache-2.0
"""Annotated videos as data sets of an MMEngine config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import DATASETS
from torch.utils.data import Dataset

from ahcq_plugin.zoo.videos import DAVIS, Video, read_videos, write_clips


@DATASETS.register_module()
class VideoFolder(Dataset):
    """Videos in the official layout of DAVIS-2017 or SA-V.

    Args:
        data_root, layout, split, names: see :func:`ahcq_plugin.zoo.videos.read_videos`.
        every: use each ``every``-th frame only; where annotations are sparse they must fall on these.
        max_frames: of these, the first ones only; None: all.
    """

    metainfo: Mapping[str, Any] = {}

    def __init__(
        self,
        data_root: str,
        layout: str,
        split: str | None = None,
        names: Sequence[str] | None = None,
        every: int = 1,
        max_frames: int | None = None,
    ):
        self.layout = layout
        self.videos = read_videos(data_root, layout, split, names, every, max_frames)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Video:
        return self.videos[index]


@DATASETS.register_module()
class GeneratedClips(VideoFolder):
    """Clips of :func:`ahcq_plugin.zoo.videos.write_clips`, drawn on first use.

    Args:
        data_root: folder of the clips; each (count, seed, frames, size) gets its own below it.
        count, seed, frames, size: see ``write_clips``.
    """

    def __init__(self, data_root: str, count: int, seed: int = 0, frames: int = 12, size: int = 128):
        folder = write_clips(f"{data_root}/clips_{count}_{seed}_{frames}_{size}", count, seed, frames, size)
        super().__init__(str(folder), DAVIS)
