# SPDX-License-Identifier: Apache-2.0
"""Functions that the tracer puts into a graph: refusals of what a unit was not captured for, and written items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

# as tuples: torch.compile does not follow `isinstance(x, A | B)`
_SEQUENCES, _PLAIN = (tuple, list), (bool, int, float, str, torch.dtype)
_WAY_OUT = "leave the unit out with `units=`"


@has_side_effect
def check_fixed(value: Any, fixed: Any, name: str, kind: str) -> None:
    """Refuse a value other than the one that the unit was traced with.

    Raises:
        ValueError: ``value`` is not ``fixed``.
    """
    if not _same(_number(value), fixed):
        raise ValueError(
            f"argument `{name}` was fixed to {kind}{fixed!r} when this unit was traced, got "
            f"{_shown(value)}; call the unit as it was, or {_WAY_OUT}"
        )


@has_side_effect
def check_given(value: Any, name: str) -> None:
    """Refuse a call without a tensor that the unit was captured with.

    Raises:
        ValueError: ``value`` is None.
    """
    if value is None:
        raise ValueError(f"argument `{name}` was a tensor when this unit was traced, got None; give it, or {_WAY_OUT}")


@has_side_effect
def check_answer(value: Any, answer: Any, line: str) -> None:
    """Refuse inputs for which the unit's code would go another way than it went when it was captured.

    Raises:
        ValueError: ``value`` is not ``answer``.
    """
    if _number(value) != answer:
        raise ValueError(
            f"this unit was captured where `{line}` gave {answer!r}; for these inputs it gives {value!r}: calibrate "
            f"with inputs of this size and rank, or {_WAY_OUT}"
        )


def put(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """A copy of ``tensor`` with ``value`` at ``place``: what ``tensor[place] = value`` becomes, so that every value in
    the graph stays what it was when a quantizer saw it."""
    changed = tensor.clone()
    changed[place] = value
    return changed


CHECKS = frozenset({check_fixed, check_given, check_answer})


def _number(value: Any) -> Any:
    """Sizes, and what is computed from them, are tensors while torch.jit traces for ONNX."""
    return value.item() if isinstance(value, Tensor) and torch.jit.is_tracing() and value.ndim == 0 else value


def _same(value: Any, fixed: Any) -> bool:
    if value is fixed:
        return True
    if isinstance(fixed, _SEQUENCES):  # sizes arrive as torch.Size or tuple
        fits = isinstance(value, _SEQUENCES) and len(value) == len(fixed)
        return fits and all(_same(_number(a), b) for a, b in zip(value, fixed, strict=True))
    if isinstance(fixed, dict):
        return isinstance(value, dict) and list(value) == list(fixed) and all(_same(value[k], fixed[k]) for k in fixed)
    if type(value) is not type(fixed):
        return False
    return isinstance(fixed, _PLAIN) and value == fixed


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__
