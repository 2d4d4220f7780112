# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model given as a mapping: their types and bounds, and what the classes that are built of them say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_MOST = 65_536  # beyond any model: what is larger is a slip, and asks for more memory than there is
_FROM_ZERO = {"window_size", "global_attn_indexes", "global_att_blocks", "window_spec", "pixel_mean"}
_REAL = {"mlp_ratio"}


def check_sizes(cfg: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Every value is of the type that the packaged config has there, and above 0 (windows, numbers of blocks and means
    from 0 on), at most 65,536.

    Args:
        like: a config that is right, with the same keys.

    Raises: ValueError: keys are missing or unknown, or a value is of another type or size.
    """
    if set(cfg) != set(like):
        raise ValueError(
            f"model config: missing keys {sorted(set(like) - set(cfg))}, "
            f"unknown keys {sorted(set(cfg) - set(like), key=str)}"
        )
    for key, value in cfg.items():
        if not _fits(value, float(like[key]) if key in _REAL else like[key], key in _FROM_ZERO):
            raise ValueError(f"model config: `{key}` cannot be {value!r:.60}; the packaged model has {like[key]!r}")


def _fits(value: Any, like: Any, from_zero: bool) -> bool:
    if isinstance(like, bool):
        return isinstance(value, bool)
    if isinstance(like, (list, tuple)):
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(_fits(v, like[0], from_zero) for v in value)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(like, float) else int):
        return False
    return math.isfinite(value) and (0 < value <= _MOST or (from_zero and value == 0))


@contextmanager
def built_of(what: str) -> Iterator[None]:
    """Within the context, errors of the classes of a model become a ValueError: sizes that do not go together."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model config: these sizes build no {what} ({reason:.200})") from error
