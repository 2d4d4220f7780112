# SPDX-License-Identifier: Apache-2.0
"""Arguments of public functions: what cannot be one is named, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def check_model(model: Any, name: str = "model") -> None:
    """TypeError for anything but an ``nn.Module`` whose Python can be followed."""
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {_kind(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"`{name}` is a ScriptModule, whose code is compiled: give the module that it was made from")


def check_function(function: Any, name: str) -> None:
    """TypeError for what cannot be called; None is no function."""
    if not callable(function):
        raise TypeError(f"`{name}` must be a function, got {_kind(function)}")


def check_flag(value: Any, name: str) -> None:
    """TypeError for anything but True and False, so that 'no' is not taken for yes."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r:.60}")


def check_mapping(value: Any, name: str) -> None:
    """TypeError for anything but a mapping whose keys are texts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` must be a dict with texts as keys, got {value!r:.60}")


def check_usable(device: torch.device | str) -> torch.device:
    """A device that can hold a tensor.

    Raises: ValueError: another, with what torch says of it.
    """
    try:
        if isinstance(device, bool) or not isinstance(device, (str, torch.device, int)):
            raise RuntimeError(f"got {_kind(device)}")
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("tensors on it have no values")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason:.200}; give cpu, cuda or cuda:N") from error
    return device


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.40}".strip()
