# SPDX-License-Identifier: Apache-2.0
"""One video and the objects that are followed in it, by the graphs of a SAM 2; no PyTorch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ahcq_plugin.export.onnx_resize import resize_bilinear
from ahcq_plugin.export.onnx_sam2 import OnnxSam2
from ahcq_plugin.export.onnx_sam2_memory import MemoryBank, Remembered

_BOX = (2, 3)  # labels of its corners


@dataclass
class _Object:
    bank: MemoryBank
    #: what prompts gave since objects were last followed: (is the frame a prompted one, frame) -> result
    pending: dict[tuple[bool, int], Remembered] = field(default_factory=dict)
    #: frames that were followed -> backwards or not
    passed: dict[int, bool] = field(default_factory=dict)


class Video:
    """Prompts in, masks of all frames out, as of ``SAM2VideoPredictor``.

    Args:
        sam: the graphs.
        frames: (H, W, 3) uint8 RGB each, or (3, S, S) float32 as the encoder takes them; read one at a time.
        size: (height, width) of the masks; None: that of the first frame.
    """

    def __init__(self, sam: OnnxSam2, frames: Sequence[np.ndarray], size: tuple[int, int] | None = None):
        self.sam, self.frames = sam, frames
        if size is None:
            first = frames[0]
            size = first.shape[:2] if first.dtype == np.uint8 else first.shape[1:]
        self.size = (int(size[0]), int(size[1]))
        self.objects: dict[Hashable, _Object] = {}
        self._encoded: tuple[int, list[np.ndarray]] | None = None

    def prompt(
        self,
        frame: int,
        name: Hashable,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Say where an object is. All prompts of a frame are given together: new ones take the place of older ones, but
        a mask that these gave is refined.

        Args:
            name: of the object, new or known.
            points, labels: (P, 2) x, y in pixels of the frame and (P,), 1 foreground, 0 background.
            box: (4,) xyxy.
            mask: (h, w) bool, alone.
        Returns:
            Logits (height, width) of the object in this frame.
        Raises:
            ValueError: no prompt, a mask beside others, points without labels, a frame that there is not.
        """
        if not 0 <= frame < len(self.frames):
            raise ValueError(f"`frame` must lie in [0, {len(self.frames) - 1}], got {frame}")
        if (points is None) != (labels is None):
            raise ValueError("`points` and `labels` belong together, got one of them: give both or neither")
        clicked = points is not None or box is not None
        if clicked == (mask is not None):
            raise ValueError("give points, a box or both, or a mask alone")
        followed = self.objects.setdefault(name, _Object(MemoryBank(self.sam.bundle["memory"], self.sam.constants)))
        embeddings, *features = self._encode(frame)
        is_new = frame not in followed.passed
        key = (is_new or self.sam.bundle["memory"]["corrected_frames_are_prompted"], frame)
        if mask is not None:
            found = self.sam.from_mask(embeddings, features, self._fitted(mask))
        else:
            places, kinds = self._clicks(points, labels, box)
            older = followed.pending.get(key, followed.bank.find(frame))
            limit = self.sam.bundle["prompts"]["logits_limit"]
            found = self.sam.decode(
                self._conditioned(followed.bank, frame, embeddings, None if is_new else followed.passed[frame]),
                features,
                places,
                kinds,
                None if older is None else np.clip(older.logits, -limit, limit),
                self._is_multimask(len(kinds), is_new),
            )
        followed.pending[key] = found
        return self._shown(found)

    def propagate(
        self, start: int | None = None, count: int | None = None, reverse: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Follow all objects from ``start`` (default: the first prompted frame) over ``count`` frames more (default:
        all), backwards with ``reverse``.

        Yields:
            (frame number, (N, height, width) float32 logits), objects in the order in which they were named.
        Raises:
            RuntimeError: an object was not prompted.
        """
        self._settle()
        if start is None:
            start = min(min(followed.bank.prompted) for followed in self.objects.values())
        count = len(self.frames) if count is None else count
        order = range(start, min(start + count, len(self.frames) - 1) + 1)
        if reverse:
            order = range(start, max(start - count, 0) - 1, -1) if start > 0 else range(0)
        for frame in order:
            yield frame, np.stack([self._shown(self._follow(o, frame, reverse)) for o in self.objects.values()])

    def _follow(self, followed: _Object, frame: int, reverse: bool) -> Remembered:
        found = followed.bank.prompted.get(frame)
        if found is None:
            embeddings, *features = self._encode(frame)
            conditioned = self._conditioned(followed.bank, frame, embeddings, reverse)
            found = self.sam.decode(conditioned, features, multimask=self._is_multimask(0, False))
            found.memory = self.sam.remember(embeddings, found, prompted=False)
            followed.bank.tracked[frame] = found
        followed.passed[frame] = reverse
        return found

    def _settle(self) -> None:
        """Make memories of what prompts gave."""
        if not self.objects:
            raise RuntimeError("no object to follow: call prompt first")
        for followed in self.objects.values():
            for (is_prompted, frame), found in sorted(followed.pending.items(), key=lambda item: item[0][0]):
                found.memory = self.sam.remember(self._encode(frame)[0], found, prompted=True)
                (followed.bank.prompted if is_prompted else followed.bank.tracked)[frame] = found
            followed.pending.clear()
            for frame in followed.bank.prompted:
                followed.bank.tracked.pop(frame, None)

    def _encode(self, frame: int) -> list[np.ndarray]:
        """Embeddings and the two features of a frame; the last one is kept."""
        if self._encoded is None or self._encoded[0] != frame:
            self._encoded = frame, self.sam.image_encoder({"image": self.sam.prepare(self.frames[frame])})
        return self._encoded[1]

    def _conditioned(self, bank: MemoryBank, frame: int, embeddings: np.ndarray, reverse: bool | None) -> np.ndarray:
        """Embeddings with memories, or with the sign that there are none where ``reverse`` is None."""
        if reverse is None:
            return embeddings + self.sam.constants["no_memory"]
        return self.sam.attend(embeddings, *bank.tokens(frame, len(self.frames), reverse))

    def _is_multimask(self, points: int, is_new: bool) -> bool:
        rules = self.sam.bundle["multimask"]
        least, most = rules["points"]
        return rules["of_prompted_frames" if is_new else "of_tracked_frames"] and least <= points <= most

    def _clicks(
        self, points: np.ndarray | None, labels: np.ndarray | None, box: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(P, 2) in pixels of the resized frame and (P,), the corners of a box first."""
        places, kinds = [np.zeros((0, 2), np.float32)], [np.zeros(0, np.float32)]
        if box is not None:
            places.append(np.asarray(box, np.float32).reshape(2, 2))
            kinds.append(np.array(_BOX, np.float32))
        if points is not None:
            places.append(np.asarray(points, np.float32).reshape(-1, 2))
            kinds.append(np.asarray(labels, np.float32).reshape(-1))
        size = np.array(self.size[::-1], np.float32)
        return np.concatenate(places) / size * np.float32(self.sam.side), np.concatenate(kinds)

    def _fitted(self, mask: np.ndarray) -> np.ndarray:
        """(S, S) bool."""
        side = self.sam.side
        if mask.shape == (side, side):
            return mask.astype(bool)
        return resize_bilinear(mask.astype(np.float32), (side, side), antialias=True) >= 0.5

    def _shown(self, found: Remembered) -> np.ndarray:
        logits = found.logits[0, 0]
        return logits if logits.shape == self.size else resize_bilinear(logits, self.size)
