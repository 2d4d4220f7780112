# SPDX-License-Identifier: Apache-2.0
"""A detector's checkpoint, read without running what it may ask for, and put into the Runner's model.

MMEngine's own loader unpickles whatever it is given; nothing here calls it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from torch import Tensor, nn

from ahcq_plugin.mm.weights import download
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.zoo.checkpoints import CHECKPOINT_DIR
from ahcq_plugin.zoo.published import PublishedFile, damage, of_path


def read_detector(cfg: Config) -> dict[str, Tensor]:
    """State dict of the checkpoint ``load_from``, names as the detector's; a URL is fetched into ``checkpoints/`` once.

    Files that only pickle can read need ``trust_checkpoint = True`` in the config (``--trust-checkpoint``).

    Raises:
        FileNotFoundError, ValueError: no such file, refused, damaged, or without a state dict.
    """
    path = _local(str(cfg.load_from))
    entry = of_path(path)
    if entry is not None and path.is_file() and (wrong := damage(path, entry, bool(entry.convert))):
        raise ValueError(f"the detector checkpoint {path} is damaged: {wrong}; remove it and fetch it again")
    # OpenMMLab publishes in the format before zip, which has no checksum
    loaded = safe_load(path, trust=bool(cfg.get("trust_checkpoint")), legacy=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"the detector checkpoint {path} holds no state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_detector(model: nn.Module, cfg: Config) -> None:
    """Put ``read_detector``'s tensors into a Runner's detector; ``check_detector`` has said that they fit."""
    model = getattr(model, "module", model)  # several processes wrap it
    model.load_state_dict(read_detector(cfg), strict=False)  # old files lack counters of batches


def _local(path: str) -> Path:
    if "://" not in path:
        return Path(path)
    name = path.rpartition("/")[2]
    local = CHECKPOINT_DIR / name
    if not os.path.isfile(local):
        entry = of_path(name) or PublishedFile(name, name, path)
        if entry.url != path:
            entry = PublishedFile(name, name, path, entry.sha256)
        try:
            download(entry, local)
        except ConnectionError as error:
            raise FileNotFoundError(str(error)) from error
    return local
