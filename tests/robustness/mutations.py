# SPDX-License-Identifier: Apache-2.0
"""Content that is nested, whole and wrong in one place, drawn at random: what no list of cases would name."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: What stands in the place of any value.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, -(2**63), 10**30, 0.5, -0.5, 1e-320, 1e39, 1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "0", "../x", "a\0b", "\ud800", "x" * 5000, "*", "[", "é中"),
    *([], [None], [[]], [1, 2], ["x", 5], {}, {"x": 1}, {"": None}, [[1]] * 3),
)
#: What a value becomes that stays of its kind.
_NUMBERS: tuple[Callable[[Any], Any], ...] = (
    lambda n: -n,
    lambda n: n + 1,
    lambda n: n * 1000,
    lambda n: 0,
    float,
    str,
)
_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t[:0],
    lambda t: t.flatten()[:1],
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.reshape(-1)[0] if t.numel() else t,
    lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t.float(),
    lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t.double(),
    lambda t: torch.zeros_like(t),
    lambda t: -t if t.dtype not in (torch.bool, torch.uint8) else t.long() - 300,
    lambda t: t.to(torch.int8),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.bool(),
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: t.tolist(),
)


def mutated(content: Any, chance: random.Random, values: tuple[Any, ...] = VALUES) -> tuple[Any, str]:
    """A copy that differs in one place, and in words where and how."""
    whole = [copy.deepcopy(content)]
    parent, key, path = whole, 0, ""
    while _children(parent[key]) and chance.random() < 0.85:
        parent = parent[key]
        key = chance.choice(_children(parent))
        path += f"[{key!r}]"
    old = parent[key]
    how = chance.randrange(4)
    if how == 0 and parent is not whole:
        del parent[key]
        return whole[0], f"without {path}"
    if how == 1 and isinstance(parent, list) and parent is not whole:
        parent.insert(key, old)
        return whole[0], f"{path} twice"
    if how == 1 and isinstance(parent, dict):
        parent[chance.choice(("x", "", "../x", f"{key}.", 5, None))] = old
        return whole[0], f"one more beside {path}"
    if isinstance(old, (torch.Tensor, np.ndarray)) and how != 3:
        change = chance.randrange(len(_TENSORS))
        new = _TENSORS[change](torch.as_tensor(np.array(old) if isinstance(old, np.ndarray) else old.clone()))
        parent[key] = new.numpy() if isinstance(old, np.ndarray) and isinstance(new, torch.Tensor) else new
        return whole[0], f"{path}, tensor changed by {change}"
    if isinstance(old, (int, float)) and not isinstance(old, bool) and how == 2:
        parent[key] = chance.choice(_NUMBERS)(old)
    else:
        parent[key] = copy.deepcopy(chance.choice(values))
    return whole[0], f"{path} = {parent[key]!r:.60}"


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
