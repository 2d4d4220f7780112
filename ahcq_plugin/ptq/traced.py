# SPDX-License-Identifier: Apache-2.0
"""Proof that a traced unit computes what its block computes, on the block's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import UnitError

#: Of the largest value. Products that were written out (fused attention) round in another order: 1e-6 of it.
TOLERANCE = 1e-3


def check_traced(model: nn.Module, traced: Mapping[str, nn.Module], run: Callable[[nn.Module], Any]) -> None:
    """Run ``model`` and compare every call of a block with its trace on the same inputs.

    Args:
        model: still with its own blocks.
        traced: names of blocks -> their traces.
        run: runs the model on an item of data.
    Raises:
        UnitError: a trace refuses the call, or gives another structure, or values that differ by more than
            ``TOLERANCE``.
    """
    outputs: dict[str, Any] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = pytree.tree_map(_copied, (args, kwargs))  # a block may change its inputs
            try:
                outputs[name] = traced[name](*args, **kwargs)
            except Exception as error:
                raise UnitError(f"unit '{name}': {str(error).strip() or type(error).__name__}") from error

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            problem = _difference(outputs.pop(name), output)
            if problem:
                raise UnitError(
                    f"unit '{name}' ({type(module).__name__}): its trace does not compute what the block computes: "
                    f"{problem}. Leave it out with `units=`"
                )

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name in traced:
            block = model.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after(name)).remove)
        run(model)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _difference(ours: Any, theirs: Any) -> str | None:
    """How two outputs differ, None if they do not."""
    (leaves, structure), (wanted, expected) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    if structure != expected:
        return f"its output is {structure}, not {expected}"
    return next(filter(None, map(_leaf_difference, leaves, wanted)), None)


def _leaf_difference(ours: Any, theirs: Any) -> str | None:
    if type(ours) is not type(theirs):
        return f"it returns {type(ours).__name__} instead of {type(theirs).__name__}"
    if isinstance(ours, bool | int | float | str) and ours != theirs:
        return f"it returns {ours!r} instead of {theirs!r}"
    if not isinstance(ours, Tensor):
        return None
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"it returns {ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    apart = (ours - theirs).abs()[(ours != theirs) & ~(ours.isnan() & theirs.isnan())]
    largest = theirs[theirs.isfinite()].abs().max() if bool(theirs.isfinite().any()) else 0.0
    if bool((apart <= TOLERANCE * largest).all()):  # false of NaN
        return None
    return f"values differ by up to {float(apart.max()):.3g}"
