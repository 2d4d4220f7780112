# SPDX-License-Identifier: Apache-2.0
"""Groups of options in ``test_cfg``, as frozen dataclasses that say what is wrong with a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

#: Beyond any use: catches slips.
_MOST = 10**9


@dataclass(frozen=True)
class Options:
    """Base of the frozen dataclasses for a key of ``test_cfg``, named ``KEY``; the fields named in ``COUNTS`` are
    positive integers, of at most ``MOST``, or None where that is their default."""

    KEY: ClassVar[str]
    COUNTS: ClassVar[tuple[str, ...]] = ()
    MOST: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        for key in self.COUNTS:
            value, may_lack = getattr(self, key), getattr(type(self), key) is None
            if value is None and may_lack:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                allowed = "a positive integer or None" if may_lack else "a positive integer"
                raise ValueError(f"{self.KEY}: `{key}` must be {allowed}, got {value!r}")
            if value > self.MOST.get(key, _MOST):
                raise ValueError(f"{self.KEY}: `{key}` must be at most {self.MOST.get(key, _MOST):,}, got {value!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Self:
        """From the value of the key. Raises ValueError on an unknown key or a bad value."""
        if config is not None and not isinstance(config, Mapping):
            raise ValueError(f"{cls.KEY} must be a dict, got {config!r}")
        config = dict(config or {})
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(map(str, set(config) - set(allowed)))
        if unknown:
            raise ValueError(f"{cls.KEY}: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")
        return cls(**config)


@dataclass(frozen=True)
class BoxOptions(Options):
    """Which boxes become prompts, and how many are decoded at once; see ``BoxPromptedSAM``."""

    KEY: ClassVar[str] = "test_cfg"
    COUNTS: ClassVar[tuple[str, ...]] = ("max_boxes", "box_chunk")

    score_thr: float = 0.05
    max_boxes: int = 100
    box_chunk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.score_thr
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"test_cfg: `score_thr` must be a number from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Base of the options of ``test_cfg.calib``: the data set, and the seed of what is chosen from it."""

    KEY: ClassVar[str] = "calib"

    dataset: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"calib: `seed` must be an integer in [0, 2**32), got {self.seed!r}")
        if not isinstance(self.dataset, (Mapping, type(None))):
            raise ValueError(f"calib: `dataset` must be the config of a data set, got {self.dataset!r:.80}")
