# SPDX-License-Identifier: Apache-2.0
"""Readers of MMEngine that run what a file asks for, replaced while a config is read and run.

A pickle is a program, and so is a YAML file for the loader that MMEngine gives it to; checkpoints that a model's own
constructor loads (a teacher's, say) are unpickled. None of that is needed for a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from mmengine.fileio.handlers import JsonHandler, PickleHandler, YamlHandler, file_handlers
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ahcq_plugin.support.files import unique_keys
from ahcq_plugin.support.safe_load import safe_load


class _Json(JsonHandler):
    """Refuses objects with one key twice, of which the first would be lost."""

    def load_from_fileobj(self, file: Any) -> Any:
        return json.load(file, object_pairs_hook=unique_keys)


class _Yaml(YamlHandler):
    """Plain values only, no objects; no key twice."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        return yaml.load(file, Loader=_PlainLoader)


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's where PyYAML has it, ten times as fast: a config of ``mmdet::`` reads a hundred small files."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        unique_keys([(key, None) for key in own])
        return super().construct_mapping(node, deep)


class _Pickle(PickleHandler):
    """Reads nothing."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        raise ValueError("the config names a pickle, which can run any code: convert it to JSON")


def _read_checkpoint(filename: str, map_location: Any = None, **_: Any) -> dict[str, Tensor]:
    return safe_load(filename, map_location or "cpu", legacy=True)


@contextmanager
def safe_readers() -> Iterator[None]:
    """Within the context, or the function that it decorates, MMEngine unpickles nothing: ``mmengine.load`` refuses
    pickles, reads YAML as plain values and JSON without keys that stand twice; checkpoints go through ``safe_load``."""
    handlers, schemes = dict(file_handlers), CheckpointLoader._schemes
    refused, plain = _Pickle(), _Yaml()
    file_handlers.update(json=_Json(), yaml=plain, yml=plain, pkl=refused, pickle=refused)
    CheckpointLoader._schemes = {"": _read_checkpoint}  # of URLs too, which it refuses
    try:
        yield
    finally:
        file_handlers.update(handlers)
        CheckpointLoader._schemes = schemes
