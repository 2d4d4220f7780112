# SPDX-License-Identifier: Apache-2.0
"""Config files of MMEngine, which are programs: whatever goes wrong in them is one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ahcq_plugin.mm.readers import safe_readers

#: What reading a config may raise, which is a program: it may also name itself as its base, or end the process.
_CONFIG_ERRORS = (Exception, SystemExit)
#: What keys of a config hold.
_KINDS: dict[str, type] = dict.fromkeys(("recipe", "test_cfg", "sam", "model", "test_dataloader"), Mapping)
_KINDS |= dict.fromkeys(("load_from", "default_scope", "data_source", "work_dir"), str)
_KINDS["trust_checkpoint"] = bool
_WORDS = {str: "text", bool: "True or False"}


@safe_readers()
def load_config(path: str | Path) -> Config:
    """What a config file says.

    Raises:
        FileNotFoundError, ValueError: no such file, not a config.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}")
    try:
        return Config.fromfile(path)
    except _CONFIG_ERRORS as error:
        raise ValueError(f"cannot read the config {path}: {type(error).__name__}: {error}") from error


def read_config(path: str | Path, cfg_options: Mapping[str, Any] | None = None) -> Config:
    """Config with overrides merged, a recipe's name made a mapping.

    Raises:
        FileNotFoundError, ValueError: no such file, not a config, an override of a key that is not there.
    """
    return with_options(load_config(path), cfg_options)


def with_options(cfg: Config, cfg_options: Mapping[str, Any] | None) -> Config:
    """``cfg``, in place, with overrides merged, a recipe's name made a mapping.

    Raises:
        ValueError: an override of a key that is not there, an entry of another kind than it has to be.
    """
    if isinstance(cfg.get("recipe"), str):
        cfg.recipe = dict(name=cfg.recipe)
    for key in cfg_options or {}:
        if key.split(".")[0] not in cfg:
            raise ValueError(f"--cfg-options: unknown config key {key!r}; the config has {', '.join(sorted(cfg))}")
    try:
        cfg.merge_from_dict(dict(cfg_options or {}))
    except (KeyError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(f"--cfg-options: {error}") from error
    for key, kind in _KINDS.items():
        if not isinstance(cfg.get(key), (kind, type(None))):
            raise ValueError(f"the config's `{key}` must be {_WORDS.get(kind, 'a dict')}, got {cfg[key]!r:.60}")
    return cfg
