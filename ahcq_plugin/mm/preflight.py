# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong with a run and be known in seconds, before the hours: one line each."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.registry import LOOPS

from ahcq_plugin.mm.box_prompted_sam import check_sam_config
from ahcq_plugin.mm.data.settings import check_loader
from ahcq_plugin.mm.quantization_loop import QuantizationLoop

#: Top-level keys that are read; a name close to one of them is taken for a typing error.
KNOWN_KEYS = ("recipe", "test_cfg", "test_dataloader", "load_from")
_GIVEN_BY_RUNNER = {"self", "runner", "dataloader", "evaluator"}


def preflight(cfg: Config, random_weights: bool = False) -> None:
    """Check a config for a PTQ run; with ``random_weights`` the detector needs no checkpoint.

    ``data_source`` at the config's top level says where missing data are to be had.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong and what to do.
    """
    check_keys(cfg)
    loop_class(cfg).check(cfg, random_weights)


def loop_class(cfg: Config) -> type[QuantizationLoop]:
    """The class of the config's test loop.

    Raises:
        ValueError: it is none of ours.
    """
    kind = (cfg.get("test_cfg") or {}).get("type")
    if isinstance(kind, str):
        kind = LOOPS.get(kind)
    if not (isinstance(kind, type) and issubclass(kind, QuantizationLoop)):
        raise ValueError(
            "not a PTQ config: it needs custom_imports = dict(imports=['ahcq_plugin.mm']) "
            "and test_cfg = dict(type='PTQLoop' or 'VideoPTQLoop', ...)"
        )
    return kind


def check_keys(cfg: Config) -> None:
    """Unknown or missing keys of the config, of ``test_cfg`` and of what is needed at the top level.

    Raises:
        ValueError: one line that names the key.
    """
    for key in cfg:
        close = difflib.get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.8)
        if close and key not in KNOWN_KEYS:
            raise ValueError(f"unknown config key {key!r}: did you mean {close[0]!r}?")
    if cfg.get("resume"):
        raise ValueError("the config has `resume`, MMEngine's for training: give --resume, or test_cfg.resume = True")
    kind = loop_class(cfg)
    for key in ("recipe", "sam"):
        if key in cfg.test_cfg:
            raise ValueError(f"test_cfg has `{key}`: it belongs at the top level of the config")
    allowed = [name for name in inspect.signature(kind).parameters if name not in _GIVEN_BY_RUNNER]
    unknown = sorted(set(cfg.test_cfg) - {"type", "_scope_"} - set(allowed))
    if unknown:
        raise ValueError(f"test_cfg: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")
    if not isinstance(cfg.test_cfg.get("resume", False), bool):
        raise ValueError(f"test_cfg: `resume` must be True or False, got {cfg.test_cfg.resume!r}")
    leave = cfg.test_cfg.get("leave", [])
    if not isinstance(leave, (list, tuple)) or not all(isinstance(entry, str) for entry in leave):
        raise ValueError(f"test_cfg: `leave` takes a list of names and globs, got {leave!r}")
    for key in ("recipe", "sam", "model", "test_dataloader"):
        if cfg.get(key) is None:
            raise ValueError(f"the config has no `{key}`")
    for key, part, kind in (("test_dataloader", "dataset", Mapping), ("model", "type", (str, type))):
        if not isinstance(cfg[key].get(part), kind):
            raise ValueError(f"the config's `{key}` needs a `{part}`, got {dict(cfg[key])!r:.80}")
    check_sam_config(cfg.sam)
    check_loader(cfg.test_dataloader, "test_dataloader")
    _check_evaluator(cfg.get("test_evaluator"))


def _check_evaluator(evaluator: Any) -> None:
    """The loop on images measures by itself and builds none, so that nobody else would look at it."""
    for entry in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if not (isinstance(kind, type) or (isinstance(kind, str) and METRICS.get(kind) is not None)):
            raise ValueError(f"test_evaluator must be a dict with the `type` of a metric, got {evaluator!r:.80}")
