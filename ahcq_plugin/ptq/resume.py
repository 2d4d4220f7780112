# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run leaves in its work dir, and whether it belongs to the run that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.ptq.prepared import resizing
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.state import load_state
from ahcq_plugin.support.workers import Workers


class ResumeError(ValueError):
    """What an interrupted run left was made with another model, other data or another recipe."""


@dataclass(frozen=True)
class UnitReport:
    """Outcome of one unit.

    Attributes:
        error_before, error_after: ||out - fp||^2 / ||fp||^2 of the unit's output, mean over all calls, everything
            quantized: rounding to nearest, and after reconstruction with all quantizers in their final form.
        seconds: of the optimisation (of the first run, when resumed).
    """

    name: str
    error_before: float
    error_after: float
    iterations: int
    seconds: float


_UNCOUNTED = ("cache_device",)
_REPORT = {"name": str, "error_before": float, "error_after": float, "iterations": int, "seconds": float}
_UNIT = {"fingerprint": str, "state": dict, "report": dict}


def read_kept(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """What a run kept in a file.

    Raises:
        ResumeError: it has other keys, or values of other types. ValueError: it is damaged.
    """
    return check_kept(safe_load(path), kinds, path)


def check_kept(value: Any, kinds: Mapping[str, type], path: Path) -> dict[str, Any]:
    """``value``, of the file at ``path``; ResumeError unless it is a dict of exactly these keys and types."""
    keys = set(value) if isinstance(value, dict) else None
    if keys != set(kinds) or not all(isinstance(value[key], kind) for key, kind in kinds.items()):
        raise ResumeError(f"{path} is not what a run keeps there: remove it, or start without resume")
    return value


def fitting(path: Path) -> AbstractContextManager[None]:
    """Errors of torch while what ``path`` holds is put into a model become one line, a ValueError."""
    return blaming(f"{path} does not fit the model", "remove it, or start without resume")


def determining(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that determine what comes before tuning: all but where caches live, and ``tune_...``."""
    return {key: value for key, value in recipe.to_dict().items() if not _is_uncounted(key, tuned=False)}


def _is_uncounted(key: str, tuned: bool) -> bool:
    return key in _UNCOUNTED or (not tuned and key.startswith("tune_"))


def fingerprint(model: nn.Module, batches: Sequence[Any], recipe: Recipe, tuned: bool = False) -> str:
    """Hash of what determines the result: the model's state, the items, the recipe.

    Args:
        tuned: the result of tuning; all that comes before it does not depend on the recipe's ``tune_...``, so that a
            run goes on from there with others.
    """
    settings = {key: value for key, value in recipe.to_hash().items() if not _is_uncounted(key, tuned)}
    trees = (dict(model.state_dict()), list(batches))
    return digest([settings, *(pytree.tree_map(_by_value, tree) for tree in trees)])


def _by_value(leaf: Any) -> Any:
    """The leaf, or the name of its class: a hash of an object by its address would differ from run to run."""
    has_value = isinstance(leaf, (Tensor, np.ndarray, int, float, str, bytes, type(None)))
    return leaf if has_value else type(leaf).__name__


@dataclass(frozen=True)
class UnitFiles:
    """The finished units of a run, each a file ``001.pt``, ...; ``folder`` None keeps nothing.

    Args:
        mark: ``fingerprint`` of the run.
        resume: whether files that are there may be used.
        workers: all see ``folder``; the first writes.
    """

    folder: Path | None
    mark: str
    resume: bool
    workers: Workers

    def start(self) -> None:
        """Remove what an earlier run left, unless this one resumes it."""
        if self.folder is not None and self.workers.is_first and not self.resume:
            for stale in self.folder.glob("*.pt"):
                stale.unlink()

    def load(self, number: int, name: str, unit: nn.Module) -> UnitReport | None:
        """Give ``unit``, the one at place ``number``, its finished state; None: there is none.

        Raises:
            ResumeError: it was saved for another model, data or recipe.
        """
        if self.folder is None or not self.workers.first(self.resume and self._path(number).exists()):
            return None
        path = self._path(number)
        saved = read_kept(path, _UNIT)
        check_kept(saved["report"], _REPORT, path)
        if saved["fingerprint"] != self.mark or saved["report"]["name"] != name:
            raise ResumeError(
                f"cannot resume from {path}: it was made with another model, other calibration data or another recipe; "
                "use a new work dir, or start without resume"
            )
        load_state(unit, saved["state"], str(path), "the unit", resizing(unit))
        return UnitReport(**saved["report"])

    def save(self, number: int, unit: nn.Module, report: UnitReport) -> None:
        """Keep a finished unit."""
        if self.folder is not None and self.workers.is_first:
            state = {key: value.cpu() for key, value in unit.state_dict().items()}
            save_checked({"fingerprint": self.mark, "state": state, "report": asdict(report)}, self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}.pt"
