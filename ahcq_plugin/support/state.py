# SPDX-License-Identifier: Apache-2.0
"""State dicts: whether one fits a model, said before anything of the model is changed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_SHOWN = 3


def differences(own: Mapping[str, Tensor], state: Mapping[str, Any], any_shape: Collection[str] = ()) -> list[str]:
    """What keeps ``state`` from being loaded where ``own`` is, one line a tensor; empty when it fits.

    Args:
        own: the model's ``state_dict()``.
        any_shape: names of tensors that take the shape they find in ``state``.
    Returns:
        First the missing ones, then those that the model does not have, then those of another shape or no tensors.
    """
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not in the model" for name in state if name not in own]
    for name, tensor in own.items():
        if name not in state:
            continue
        value = state[name]
        if not isinstance(value, Tensor):
            wrong.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != tensor.shape and name not in any_shape:
            wrong.append(f"{name} has shape {tuple(value.shape)}, the model {tuple(tensor.shape)}")
    return wrong


def check_state(
    own: Mapping[str, Tensor],
    state: Mapping[str, Any],
    what: str,
    whose: str = "the model",
    any_shape: Collection[str] = (),
) -> None:
    """Raise unless ``state`` fits; see :func:`differences`.

    Args:
        what: where ``state`` is from, for the message: a path.
        whose: what it is to fit, for the message.
    Raises:
        ValueError: ``<what> does not fit <whose>: 2 of 300 tensors differ, first: a is missing; b has shape ...``, one
            line.
    """
    wrong = differences(own, state, any_shape)
    if wrong:
        first = "; ".join(wrong[:_SHOWN])
        raise ValueError(f"{what} does not fit {whose}: {len(wrong)} of {len(own)} tensors differ, first: {first}")


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    whose: str = "the model",
    any_shape: Collection[str] = (),
    same_types: bool = False,
) -> None:
    """``model.load_state_dict(state)``, strictly; a state that does not fit changes nothing.

    Args:
        same_types: every tensor must have the model's dtype; else only no whole or complex numbers may stand for
            floating-point ones.
    Raises:
        ValueError: as of :func:`check_state`; a tensor of another dtype.
    """
    own = model.state_dict()
    check_state(own, state, what, whose, any_shape)
    for name, value in own.items():
        found = state[name]
        if same_types and found.dtype != value.dtype:
            raise ValueError(f"{what} has {name} in {found.dtype}, {whose} in {value.dtype}: build it so")
        if value.is_floating_point() and not found.is_floating_point():
            raise ValueError(f"{what} has {name} in {found.dtype}, expected floating-point numbers")
    model.load_state_dict(state)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: a module keeps a tensor that was computed from its parameters, which torch does not copy.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        computed = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        if not computed:
            raise
        raise ValueError(
            f"the model cannot be copied: {', '.join(computed[:5])} is computed from parameters (weight norm, "
            "pruning); undo that first, with `remove_weight_norm` or `prune.remove` of torch.nn.utils"
        ) from error


def check_valued(model: nn.Module) -> None:
    """Raise ValueError if a parameter has no value yet: nothing can copy it."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta or is_lazy(parameter)]
    if empty:
        raise ValueError(
            f"{len(empty)} parameters have no values, first {empty[0]}: load them, or run a lazy module once on an item"
        )


def check_changeable(model: nn.Module) -> None:
    """Raise ValueError if a parameter was made in inference mode: nothing can change it in place or learn by it."""
    frozen = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters were made in torch.inference_mode(), first {frozen[0]}: build the model outside "
            "of it, or pass `copy.deepcopy(model)`, made outside of it"
        )


@torch.no_grad()
def check_finite(model: nn.Module, whose: str = "the model") -> None:
    """Every parameter is a finite number, and no buffer holds NaN (masks of attention may be infinite).

    Raises:
        ValueError: one is not; it is named.
    """
    wrong = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    wrong += [name for name, value in model.named_buffers() if bool(torch.isnan(value).any())]
    if wrong:
        raise ValueError(
            f"{whose} holds NaN or infinite values in {len(wrong)} tensors, first {wrong[0]}: look for a damaged or "
            "half-trained checkpoint"
        )
