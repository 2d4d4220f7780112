# SPDX-License-Identifier: Apache-2.0
"""What a SAM 2 remembers of one object, and what of it a frame attends to; numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_TEMPERATURE = 10000.0


@dataclass
class Remembered:
    """One object in one frame.

    Attributes:
        logits: (1, 1, 4h, 4w) float32, of the mask.
        pointer: (C,) float32.
        score: above 0 where the object is seen.
        memory: (h * w, m) float32, rounded to bfloat16; None as long as prompts of the frame may be added.
    """

    logits: np.ndarray
    pointer: np.ndarray
    score: float
    memory: np.ndarray | None = None


class MemoryBank:
    """The frames of one object: ``prompted`` ones and ``tracked`` ones, by number.

    Args:
        rules: ``memory`` of ``bundle.json``.
        constants: tensors of the bundle.
    """

    def __init__(self, rules: Mapping[str, Any], constants: Mapping[str, np.ndarray]):
        self.rules, self.constants = rules, constants
        self.prompted: dict[int, Remembered] = {}
        self.tracked: dict[int, Remembered] = {}

    def find(self, frame: int) -> Remembered | None:
        """What is known of a frame."""
        return self.prompted.get(frame, self.tracked.get(frame))

    def tokens(self, frame: int, frames: int, reverse: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """What ``frame`` of ``frames`` attends to: tokens (M, m), their positions (M, m), how many are of pointers."""
        near, far = self._nearest(frame)
        memory, positions = [], []
        for place, seen in self._remembered(frame, near, far, reverse):
            memory.append(seen.memory)
            time = self.constants["memory_times"][self.rules["frames"] - place - 1]
            positions.append(self.constants["memory_positions"] + time)
        times, pointers = [], []
        for time, seen in self._pointers(frame, frames, near, far, reverse):
            times.append(time)
            pointers.append(seen.pointer)
        count = 0
        if pointers:
            width = memory[0].shape[1]
            memory.append(np.stack(pointers).reshape(-1, width))
            count = len(memory[-1])
            limit = min(frames, self.rules["pointers"])
            positions.append(np.repeat(self._time_positions(times, limit, width), count // len(times), 0))
        return np.concatenate(memory), np.concatenate(positions), count

    def _nearest(self, frame: int) -> tuple[dict[int, Remembered], dict[int, Remembered]]:
        """Prompted frames that are attended to as such, the nearest in time, and all others."""
        limit = self.rules["prompted_frames"]
        if limit == -1 or len(self.prompted) <= limit:
            return self.prompted, {}
        before = [max((t for t in self.prompted if t < frame), default=None)]
        after = [min((t for t in self.prompted if t >= frame), default=None)]
        chosen = [t for t in before + after if t is not None]
        others = sorted((t for t in self.prompted if t not in chosen), key=lambda t: abs(t - frame))
        chosen += others[: limit - len(chosen)]
        far = {t: seen for t, seen in self.prompted.items() if t not in chosen}
        return {t: self.prompted[t] for t in chosen}, far

    def _remembered(
        self, frame: int, near: dict[int, Remembered], far: dict[int, Remembered], reverse: bool
    ) -> list[tuple[int, Remembered]]:
        """(place in time, frame): prompted ones have the place 0, the one just passed the last."""
        found = [(0, seen) for seen in near.values()]
        count, stride, step = self.rules["frames"], self.rules["stride"], -1 if reverse else 1
        for place in range(1, count):
            back = count - place
            other = frame - step
            if back > 1:
                passed = -(-(frame + 2) // stride) if reverse else (frame - 2) // stride
                other = (passed - step * (back - 2)) * stride
            seen = self.tracked.get(other, far.get(other))
            if seen is not None:
                found.append((place, seen))
        return found

    def _pointers(
        self, frame: int, frames: int, near: dict[int, Remembered], far: dict[int, Remembered], reverse: bool
    ) -> list[tuple[int, Remembered]]:
        """(distance in time, frame) of all whose pointers are attended to."""
        step, found = -1 if reverse else 1, []
        for t, seen in near.items():
            if not self.rules["pointers_of_the_past_alone"] or step * (frame - t) >= 0:
                found.append((step * (frame - t) if self.rules["times_have_signs"] else abs(frame - t), seen))
        for back in range(1, min(frames, self.rules["pointers"])):
            t = frame - step * back
            if not 0 <= t < frames:
                break
            seen = self.tracked.get(t, far.get(t))
            if seen is not None:
                found.append((back, seen))
        return found

    def _time_positions(self, times: list[int], limit: int, width: int) -> np.ndarray:
        """(len(times), m) float32: sines of the distances, through a layer where the model has one."""
        if not self.rules["pointers_have_times"]:
            return np.zeros((len(times), width), np.float32)
        weight = self.constants.get("time_weight")
        half = (width if weight is None else weight.shape[1]) // 2
        steps = np.float32(_TEMPERATURE) ** (2 * (np.arange(half) // 2) / half).astype(np.float32)
        angles = (np.array(times, np.float32) / np.float32(limit - 1))[:, None] / steps
        sines = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        return sines if weight is None else sines @ weight.T + self.constants["time_bias"]


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Finite float32 rounded to the nearest bfloat16, half to even, still as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
