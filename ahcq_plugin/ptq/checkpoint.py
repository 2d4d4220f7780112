# SPDX-License-Identifier: Apache-2.0
"""Files: written atomically, read with ``weights_only=True``."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepare import left_in, prepare
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.support.files import replacing

FORMAT = "ahcq_plugin.checkpoint/1"
CALIBRATED_FILE = "calibrated.pt"  # in a run's work dir: the state after calibration, weights in floating point


def save_atomic(obj: Any, path: str | Path) -> None:
    """``torch.save``; ``path`` is the old file or the whole new one."""
    with replacing(path) as temporary:
        torch.save(obj, temporary)


def load_file(path: str | Path, map_location: Any = "cpu") -> Any:
    """``torch.load(weights_only=True)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, struct.error) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise ValueError(f"checkpoint {path} cannot be read (truncated, or not a checkpoint?): {first_line}") from error


def save_checkpoint(path: str | Path, model: nn.Module, recipe: Recipe, extra: dict[str, Any] | None = None) -> None:
    """Save a prepared (usually frozen) model: its state, the recipe and the units; ``extra`` holds plain values."""
    content = {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "units": list(prepared_units(model)),
        "leave": left_in(model),
        "state_dict": model.state_dict(),
        "extra": extra or {},
    }
    save_atomic(content, path)


def load_checkpoint(path: str | Path, model: nn.Module) -> nn.Module:
    """Prepare a freshly built floating-point ``model`` as the checkpoint says and load its state, in place.

    Raises:
        FileNotFoundError, ValueError: no such file, unreadable, of another format, or made for another model.
    """
    content = load_file(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is not a quantized checkpoint: format {found!r}, expected {FORMAT!r}")
    prepare(model, Recipe.from_config(content["recipe"]), content["units"], leave=content.get("leave", ()))
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path} does not fit this model: {' '.join(lines)[:300]}") from error
    return model
