# SPDX-License-Identifier: Apache-2.0
"""The files of a quantized model, written atomically with a digest and read back by one reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.calls import Call
from ahcq_plugin.ptq.freeze import switch_on, unfrozen
from ahcq_plugin.ptq.packed import is_packed, plain, read_packed, write_packed
from ahcq_plugin.ptq.packed_state import calibration_state
from ahcq_plugin.ptq.prepare import calls_of, left_in, prepare, recipe_in
from ahcq_plugin.ptq.prepared import quantizers, resizing
from ahcq_plugin.ptq.recipe import Recipe, current_names
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.files import given_path
from ahcq_plugin.support.given import check_model
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.state import check_changeable, check_finite, check_valued, load_state

FORMAT = "ahcq_plugin.checkpoint/1"
QUANTIZED_FILE = "quantized.pth"  # in a run's work dir: the result
CALIBRATED_FILE = "calibrated.pt"  # in a run's work dir: the state after calibration, weights in floating point
#: Type of each value of a file.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("recipe", "calls", "state_dict", "extra"), Mapping),
    **dict.fromkeys(("units", "leave"), (list, tuple)),
}


def save_checkpoint(path: str | Path, model: nn.Module, recipe: Recipe, extra: dict[str, Any] | None = None) -> None:
    """Save a prepared (usually frozen) model: its state, the recipe and the units; ``extra`` holds plain values."""
    check_model(model)
    content = {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "units": list(prepared_units(model)),
        "leave": left_in(model),
        "calls": {name: call.to_dict() for name, call in calls_of(model).items()},
        "state_dict": model.state_dict(),
        "extra": extra or {},
    }
    save_checked(content, path)


def save_packed(
    path: str | Path,
    model: nn.Module,
    extra: Mapping[str, Any] | None = None,
    outside: str = "float32",
    built: Mapping[str, Any] | None = None,
) -> None:
    """Save a frozen model packed (``ptq.packed``).

    Args:
        extra: plain values; numbers that are not finite become None.
        outside: how floats outside of the units are stored: ``float32``, or ``float16``, rounded.
        built: what ``zoo.rebuild`` needs to build the floating-point model.
    Raises:
        ValueError: the model is not frozen, a weight is off its grid, or a float does not fit float16.
    """
    recipe = recipe_in(model)
    problems = [f"{name}: {', '.join(wrong)}" for name, q in quantizers(model) if (wrong := unfrozen(q))]
    if problems:
        raise ValueError(f"the model is not frozen, first {problems[0]}; save what `quantize` or `freeze` returned")
    content = {
        "model": built,
        "recipe": recipe.to_dict(),
        "units": list(prepared_units(model)),
        "leave": left_in(model),
        "calls": plain({name: call.to_dict() for name, call in calls_of(model).items()}),
        "extra": plain(extra or {}),
    }
    write_packed(path, model, content, outside)


@dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint, read.

    Attributes:
        path: the file, for messages.
        recipe: what the model was prepared with.
        units: names of its units.
        leave: what of them stays in floating point, as given to ``prepare``.
        calls: how they were called when they were traced.
        state: its ``state_dict``, tensors on the CPU.
        extra: plain values that were saved with it.
        packed: whether the file is packed: its model is frozen, ``state`` lacks what only calibration needs.
        built: what ``zoo.rebuild`` builds the floating-point model from; None: the file does not say.
    """

    path: Path
    recipe: Recipe
    units: list[str]
    leave: Sequence[str]
    calls: Mapping[str, Call]
    state: dict[str, Tensor]
    extra: dict[str, Any]
    packed: bool = False
    built: Mapping[str, Any] | None = None

    def load_into(self, model: nn.Module) -> nn.Module:
        """Prepare a freshly built floating-point ``model`` as the checkpoint says and load its state, in place.

        Raises:
            ValueError: made for another model, or ``model`` is prepared already.
        """
        check_valued(model)
        check_changeable(model)
        prepare(model, self.recipe, self.units, leave=self.leave, calls=self.calls)
        state = {**calibration_state(model), **self.state} if self.packed else self.state
        load_state(model, state, str(self.path), "this model", resizing(model), same_types=True)
        check_finite(model, str(self.path))
        for name, quantizer in quantizers(model):
            if not quantizer.scale.numel() or not bool((quantizer.scale > 0).all()):
                raise ValueError(f"{self.path}: the scale of {name} is not above 0; quantize the model again")
        if self.packed:
            switch_on(model)
        for _, quantizer in quantizers(model):
            quantizer.look()
        return model


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what ``save_checkpoint`` or ``save_packed`` wrote; which of them is told from the content.

    Raises:
        FileNotFoundError, ValueError: no such file, unreadable, or of another format.
    """
    path = given_path(path)
    packed = path.is_file() and is_packed(path)
    content = read_packed(path) if packed else _read_pickled(path)
    _check_content(content, path)
    try:
        recipe = Recipe.from_config(current_names(content["recipe"]))
        calls = {name: Call.from_dict(call) for name, call in content.get("calls", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"nothing under {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error
    return Checkpoint(
        path=Path(path),
        recipe=recipe,
        units=content["units"],
        leave=content.get("leave", ()),  # files from before it could be given lack it, and calls
        calls=calls,
        state=content["state_dict"],
        extra=content["extra"],
        packed=packed,
        built=content.get("model"),
    )


def _check_content(content: Mapping[str, Any], path: Path) -> None:
    """ValueError for a value of another type than was written."""
    for key, kinds in _KINDS.items():
        value = content.get(key, {} if key == "calls" else () if key == "leave" else None)
        if not isinstance(value, kinds):
            raise ValueError(f"checkpoint {path} cannot be read: its `{key}` is {value!r:.60}")
    if not all(isinstance(name, str) for name in content["state_dict"]):
        raise ValueError(f"checkpoint {path} cannot be read: its state has names that are no texts")
    for key in ("units", "leave"):
        if not all(isinstance(name, str) for name in content.get(key, ())):
            raise ValueError(f"checkpoint {path} cannot be read: its `{key}` are {content[key]!r:.60}, expected names")
    if not content["units"]:
        raise ValueError(f"checkpoint {path} cannot be read: it has no units")


def _read_pickled(path: str | Path) -> dict[str, Any]:
    content = safe_load(path)
    written = content.get("format") if isinstance(content, dict) else None
    if written != FORMAT:
        raise ValueError(f"{path} is not a quantized checkpoint: format {written!r}, expected {FORMAT!r}")
    return content
