# SPDX-License-Identifier: Apache-2.0
"""Annotated videos in the official folder layouts of DAVIS-2017 and SA-V, and generated clips in that of DAVIS."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from ahcq_plugin.support.files import check_name, read_json
from ahcq_plugin.zoo import clips
from ahcq_plugin.zoo.images import image_size, with_pillow

DAVIS, SAV = "davis", "sav"
#: layout -> folders of frames and of annotations, list of names (all below the root).
FOLDERS = {
    DAVIS: ("JPEGImages/480p", "Annotations/480p", "ImageSets/2017/{split}.txt"),
    SAV: ("JPEGImages_24fps", "Annotations_6fps", "sav_{split}.txt"),
}
MARK = "made_by.json"  # in a folder of generated clips: what they were made with


@dataclass(frozen=True)
class Video:
    """One video. ``layout`` says how its annotations are stored.

    DAVIS: one PNG a frame whose values are object ids (0: background). SA-V: one folder an object, a PNG every fourth
    frame, not 0 where the object is; objects may overlap.
    """

    name: str
    layout: str
    frame_dir: Path
    mask_dir: Path
    every: int = 1  # each so many frames one is used
    max_frames: int | None = None  # of these, the first ones

    @cached_property
    def frames(self) -> list[Path]:
        """Files of all frames that are used, in order."""
        frames = [path for path in self.frame_dir.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")]
        if not frames:
            raise FileNotFoundError(f"no JPEG frames in {self.frame_dir}")
        misnamed = [path for path in frames if not path.stem.isdecimal()]
        if misnamed:
            raise ValueError(f"frames are named by numbers, as 00000.jpg, got {misnamed[0]}")
        return sorted(frames, key=lambda path: int(path.stem))[:: self.every][: self.max_frames]

    @cached_property
    def annotated(self) -> list[int]:
        """Indices of the annotated frames, in order."""
        folders = [self.mask_dir] if self.layout == DAVIS else self._object_dirs
        stems = {path.stem for folder in folders for path in folder.glob("*.png")}
        indices = [index for index, path in enumerate(self.frames) if path.stem in stems]
        if without := sorted(stems - {path.stem for path in self.frame_dir.iterdir()}):
            raise ValueError(
                f"video {self.name}: {self.mask_dir} has an annotation of frame {without[0]}, which is missing"
            )
        if not indices or indices[0] != 0:
            raise ValueError(
                f"video {self.name}: the first frame, {self.frames[0].stem}, has no annotation in {self.mask_dir}; its "
                "masks say which objects to follow"
            )
        return indices

    @cached_property
    def objects(self) -> list[int]:
        """Ids of all objects that any annotation shows, ascending (SA-V: numbers of the folders)."""
        if self.layout == SAV:
            return [int(folder.name) for folder in self._object_dirs]
        ids = {int(n) for index in self.annotated for n in np.unique(self._labels(index))}
        return sorted(ids - {0})

    @cached_property
    def _object_dirs(self) -> list[Path]:
        folders = sorted(path for path in self.mask_dir.iterdir() if path.is_dir())
        if misnamed := [folder for folder in folders if not folder.name.isdecimal()]:
            raise ValueError(f"objects are folders named by numbers, as 000, got {misnamed[0]}")
        return folders

    def check(self) -> None:
        """A quick look at all files that are used: they are images of one size; only the first is decoded.

        Raises: ValueError, FileNotFoundError: one line that names the file.
        """
        folders = [self.mask_dir] if self.layout == DAVIS else self._object_dirs
        masks = [folder / f"{self.frames[index].stem}.png" for folder in folders for index in self.annotated]
        for path in (*self.frames, *masks):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a file")
        size = image_size(self.frames[0])
        for path in (*self.frames, *(mask for mask in masks if mask.is_file())):
            if (found := image_size(path)) != size:
                raise ValueError(f"{path} has {found} pixels (H, W), the first frame of {self.name} has {size}")
        self.masks(0)

    def image(self, index: int) -> np.ndarray:
        """A frame, (H, W, 3) uint8 RGB. ValueError: it cannot be read."""
        return with_pillow(self.frames[index], lambda image: np.array(image.convert("RGB")))

    def masks(self, index: int) -> np.ndarray:
        """Masks of all ``objects`` in an annotated frame, (N, H, W) bool.

        Raises: ValueError: the frame has no annotation (``annotated`` says which have one).
        """
        if index not in self.annotated:
            raise ValueError(f"video {self.name}: frame {self.frames[index].stem} has no annotation in {self.mask_dir}")
        if self.layout == DAVIS:
            labels = self._labels(index)
            return np.stack([labels == n for n in self.objects]) if self.objects else np.zeros((0, *labels.shape), bool)
        name = f"{self.frames[index].stem}.png"
        # an object that a frame does not show may lack its file
        shown = [_read_png(folder / name) > 0 if (folder / name).is_file() else None for folder in self._object_dirs]
        shape = next(mask.shape for mask in shown if mask is not None)
        return np.stack([np.zeros(shape, bool) if mask is None else mask for mask in shown])

    def _labels(self, index: int) -> np.ndarray:
        return _read_png(self.mask_dir / f"{self.frames[index].stem}.png")


def _read_png(path: Path) -> np.ndarray:
    """Values as they are stored, (H, W). ValueError: no image, or one with channels."""
    values = with_pillow(path, np.array)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(f"{path} has channels or fractions, an annotation holds one whole number a pixel")
    return values


def read_videos(
    root: str | os.PathLike[str],
    layout: str,
    split: str | None = None,
    names: Sequence[str] | None = None,
    every: int = 1,
    max_frames: int | None = None,
) -> list[Video]:
    """The videos below ``root``.

    Args:
        layout: ``"davis"`` or ``"sav"``, see :data:`FOLDERS`.
        split: of the list of names (``val`` for ``ImageSets/2017/val.txt`` or ``sav_val.txt``); None: every folder.
        names: only these.
        every, max_frames: see :class:`Video`.

    Raises:
        ValueError: unknown layout, bad number, no video, or a name twice.
        FileNotFoundError: a folder or the list is missing.
    """
    if layout not in FOLDERS:
        raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(FOLDERS)}")
    if every < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"`every` and `max_frames` must be at least 1, got {every} and {max_frames}")
    frame_root, mask_root, listing = (Path(root) / part for part in FOLDERS[layout])
    for folder in (frame_root, mask_root):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} (layout {layout!r})")
    chosen = sorted(path.name for path in mask_root.iterdir() if path.is_dir())
    if split is not None:
        file = Path(str(listing).format(split=split))
        if not file.is_file():
            raise FileNotFoundError(f"no list of videos {file}")
        chosen = file.read_text(encoding="utf-8").split()
    if names is not None:
        missing = sorted(set(names) - set(chosen))
        if missing:
            raise ValueError(f"{root} has no video {', '.join(missing)}; it has {', '.join(chosen[:20])}")
        chosen = list(names)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"{root}: no video, or one listed twice")
    for name in chosen:
        for folder in (frame_root / name, mask_root / name):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}")
    return [Video(name, layout, frame_root / name, mask_root / name, every, max_frames) for name in chosen]


def write_clips(out_dir: str | os.PathLike[str], count: int, seed: int = 0, frames: int = 12, size: int = 128) -> Path:
    """Write ``count`` generated clips in DAVIS layout: clip ``i`` is ``render_clip((seed, i), frames, size)``.

    Frames are JPEGs of quality 95. The folder appears only when complete; one written earlier, or by another process in
    the meantime, with the same arguments is used again.

    Returns: ``out_dir``. Raises: FileExistsError when it holds anything else.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    out_dir = Path(out_dir)
    check_name(out_dir)
    made_by = {"version": clips.VERSION, "seed": seed, "frames": frames, "size": size, "count": count}
    if _holds_clips(out_dir, made_by):
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        for index in range(count):
            images, masks = clips.render_clip((seed, index), frames, size)
            labels = (masks * np.arange(1, masks.shape[1] + 1, dtype=np.uint8)[:, None, None]).max(1).astype(np.uint8)
            for kind, arrays, suffix in (("JPEGImages", images[..., ::-1], "jpg"), ("Annotations", labels, "png")):
                folder = partial / kind / "480p" / f"clip{index:03d}"
                folder.mkdir(parents=True)
                for number, array in enumerate(arrays):
                    path = folder / f"{number:05d}.{suffix}"
                    if not cv2.imwrite(str(path), array, [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == "jpg" else []):
                        raise OSError(f"cannot write {path}")
        (partial / MARK).write_text(json.dumps(made_by), encoding="utf-8")
        partial.chmod(0o755)
        try:
            partial.rename(out_dir)  # to a new folder or in place of an empty one, whole for whoever looks
        except OSError:
            if not _holds_clips(out_dir, made_by):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _holds_clips(folder: Path, made_by: dict[str, int]) -> bool:
    """Whether the clips asked for are there. Raises: FileExistsError: other files are."""
    mark = folder / MARK
    if mark.is_file() and read_json(mark, f"delete {folder}, and it is made again") == made_by:
        return True
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files than the clips asked for: choose another or delete it")
    return False
