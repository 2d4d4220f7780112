# SPDX-License-Identifier: Apache-2.0
"""Weight files of SAM and SAM 2: packaged or published, where they are looked for, loaded strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ahcq_plugin.support.files import given_path
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.state import load_state
from ahcq_plugin.zoo.published import PUBLISHED_FILES, PublishedFile, damage, of_model

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
#: Models whose weights come with the package.
PACKAGED = ("sam_tiny", "sam2_tiny")
#: Models whose weights are computed from packaged ones (:mod:`ahcq_plugin.zoo.hard`) -> which.
MADE_OF = {"sam_tiny_hard": "sam_tiny"}
#: Where the published weights are looked for when no path is given (relative to the working directory).
CHECKPOINT_DIR = Path("checkpoints")


def packaged_config(name: str = "sam_tiny") -> dict[str, Any]:
    """The ``model`` section of a packaged json file: constructor arguments for ``build_sam`` or ``build_sam2``."""
    return json.loads((WEIGHTS_DIR / f"{name}.json").read_text(encoding="utf-8"))["model"]


def default_checkpoint(name_or_cfg: str | Mapping[str, Any]) -> Path:
    """Where the weights of a SAM or SAM 2 are when no path is given, or those that they are made of.

    Args: name_or_cfg: as ``build_sam`` and ``build_sam2`` take it.
    Raises: ValueError: nobody publishes weights for it.
    """
    name = name_or_cfg if isinstance(name_or_cfg, str) else name_or_cfg.get("name", "")
    name = MADE_OF.get(name, name)
    if name in PACKAGED:
        return WEIGHTS_DIR / f"{name}.pth"
    entry = of_model(name)
    if entry is None:
        known = (*PACKAGED, *MADE_OF, *(entry.model for entry in PUBLISHED_FILES.values() if entry.model))
        raise ValueError(f"no weights are known for model {name_or_cfg!r}, only for {', '.join(known)}: give a path")
    return CHECKPOINT_DIR / entry.file


def require_file(path: Path, source: PublishedFile | None) -> None:
    """FileNotFoundError unless ``path`` is a file; the message says where ``source`` is to be had."""
    if path.is_file():
        return
    if source is None:
        raise FileNotFoundError(f"no weight file {path}")
    raise FileNotFoundError(
        f"no weight file {path}: download {source.url} and put it there (or give its path); "
        "--dry-run works with random weights"
    )


def load_weights(model: nn.Module, path: str | Path, source: PublishedFile | None = None) -> None:
    """Load a ``state_dict`` file, bare or as ``{"model": ...}``, strictly into ``model``; half precision is widened.

    ``source``, when its file name is that of ``path``, has size and SHA-256 compared first.
    Raises FileNotFoundError or, in one line, ValueError.
    """
    path = given_path(path, "checkpoint")
    require_file(path, source)
    if source is not None and path.name == source.file and (wrong := damage(path, source)):
        raise ValueError(f"{path} is damaged: {wrong}; download it again from {source.url}")
    state = safe_load(path)
    if isinstance(state, Mapping) and set(state) == {"model"}:  # SAM 2's files
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, expected a state_dict (names to tensors)")
    load_state(model, state, str(path))
