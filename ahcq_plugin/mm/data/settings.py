# SPDX-License-Identifier: Apache-2.0
"""What a config says of a data loader and of its data sets: types of keys that would fail far away, or not at all."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from typing import Any

from ahcq_plugin.mm.data.wrappers import wrapped

_Fits = Callable[[Any], bool]
_TEXT: tuple[_Fits, str] = (lambda v: isinstance(v, str), "a text")
_NAME: tuple[_Fits, str] = (lambda v: isinstance(v, (str, type)), "the name of a class")
_DICT: tuple[_Fits, str] = (lambda v: isinstance(v, Mapping), "a dict")
_STEPS: tuple[_Fits, str] = (
    lambda v: isinstance(v, (list, tuple)) and all(isinstance(step, Mapping) and "type" in step for step in v),
    "a list of dicts with a type",
)
_SETS: tuple[_Fits, str] = (
    lambda v: isinstance(v, (list, tuple)) and bool(v) and all(isinstance(part, Mapping) for part in v),
    "a list of dicts, at least one",
)
_MADE: tuple[_Fits, str] = (lambda v: isinstance(v, Mapping) or callable(v), "a dict")
_FLAG: tuple[_Fits, str] = (lambda v: isinstance(v, bool), "True or False")
_PREFIXES: tuple[_Fits, str] = (
    lambda v: isinstance(v, Mapping) and all(isinstance(folder, str) for folder in v.values()),
    "a dict of folders",
)
_ABOUT: tuple[_Fits, str] = (
    lambda v: isinstance(v, Mapping) and ("classes" not in v or _are_names(v["classes"])),
    "a dict, whose `classes` are a list of different names",
)
_SOME: tuple[_Fits, str] = (
    lambda v: (
        (type(v) is int and v > 0) or (isinstance(v, (list, tuple)) and all(type(n) is int for n in v) and bool(v))
    ),
    "a number above 0, or a list of whole numbers",
)


def _are_names(value: Any) -> bool:
    """Texts, or the file that lists them."""
    if isinstance(value, str):
        return os.path.isfile(value)
    names = value if isinstance(value, (list, tuple)) else ()
    return bool(names) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _whole(least: int, most: int = 10**9) -> tuple[_Fits, str]:
    return lambda v: type(v) is int and least <= v <= most, f"a whole number from {least:,} to {most:,}"


#: Key -> what its value must be; None is allowed where MMEngine has it as the default.
_OF_LOADERS = {"batch_size": _whole(1), "num_workers": _whole(0, 1024), "sampler": _DICT, "dataset": _DICT}
_OF_LOADERS |= dict.fromkeys(("persistent_workers", "pin_memory", "drop_last"), _FLAG)
_OF_LOADERS |= dict.fromkeys(("collate_fn", "batch_sampler", "worker_init_fn"), _MADE)
_OF_DATA_SETS = {
    "type": _NAME,
    "ann_file": _TEXT,
    "data_root": _TEXT,
    "data_prefix": _PREFIXES,
    "metainfo": _ABOUT,
    "filter_cfg": _DICT,
    "backend_args": _DICT,
    "indices": _SOME,
    "max_refetch": _whole(0),
    "proposal_file": _TEXT,
    **dict.fromkeys(("serialize_data", "test_mode", "lazy_init", "return_classes"), _FLAG),
    "pipeline": _STEPS,
    "datasets": _SETS,
    "dataset": _DICT,
}
_MAY_BE_NONE = {"data_root", "metainfo", "sampler", "filter_cfg", "backend_args", "indices", "proposal_file"}
_MAY_BE_NONE |= {"batch_sampler", "collate_fn", "worker_init_fn"}


def check_loader(config: Mapping[str, Any], where: str) -> None:
    """The loader's numbers, its sampler, and its data sets.

    Raises: ValueError: one line that names the key; ``where`` stands before it.
    """
    _check(config, _OF_LOADERS, where)
    sampler = config.get("sampler")
    if sampler is not None and "type" not in sampler:
        raise ValueError(f"{where}.sampler needs a `type`, got {dict(sampler)!r:.80}")
    _check(sampler or {}, {"shuffle": _FLAG}, f"{where}.sampler")
    if sampler is not None and str(sampler["type"]).endswith("InfiniteSampler"):
        raise ValueError(f"{where}.sampler must come to an end, got InfiniteSampler: use DefaultSampler")
    check_data_set(config["dataset"], f"{where}.dataset")


def check_data_set(config: Any, where: str) -> None:
    """A data set and those inside it; ValueError as of ``check_loader``."""
    if not isinstance(config, Mapping) or "type" not in config:
        raise ValueError(f"{where} must be a dict with a type, got {config!r:.80}")
    _check(config, _OF_DATA_SETS, where)
    parts = wrapped(config)
    for part in parts:
        check_data_set(part, f"{where}.{'datasets' if 'datasets' in config else 'dataset'}")


def _check(config: Mapping[str, Any], keys: Mapping[str, tuple[_Fits, str]], where: str) -> None:
    for key, (fits, expected) in keys.items():
        if key in config and not fits(config[key]) and not (config[key] is None and key in _MAY_BE_NONE):
            raise ValueError(f"{where}: `{key}` must be {expected}, got {config[key]!r:.80}")
