# SPDX-License-Identifier: Apache-2.0
"""Results kept for later runs in JSON files named after a hash of what determines them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)


class Cache:
    """A folder of results; without a folder everything is computed anew.

    With several ``workers`` the first looks into the folder and writes to it.
    """

    def __init__(self, folder: str | Path | None, workers: Workers = ALONE):
        self.folder, self.workers = None if folder is None else Path(folder), workers

    def fetch(self, name: str, key: Callable[[], str], compute: Callable[[], Any]) -> Any:
        """The JSON value kept under ``name`` and ``key()``, else ``compute()``, which is then kept.

        A file that cannot be read, or does not hold what was written, is replaced.
        """
        if self.folder is None:
            return compute()
        key_text = key()
        value = self.find(name, key_text)
        if value is None:
            value = compute()
            self.keep(name, key_text, value)
        return value

    def find(self, name: str, key: str) -> Any:
        """The value kept under ``name`` and ``key``; None where there is none that can be read."""
        path, text = self._path(name, key), None
        if self.workers.is_first and path is not None and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
        text = self.workers.first(text)
        if text is None:
            return None
        try:
            value = _opened(json.loads(text))
        except (ValueError, RecursionError) as error:
            logger.warning("%s is not readable (%s), computed again", path, error)
            return None
        logger.info("%s taken from %s", name, path)
        return value

    def keep(self, name: str, key: str, value: Any) -> None:
        """Keep a JSON value for ``find``."""
        path = self._path(name, key)
        if self.workers.is_first and path is not None:
            write_json({"sha256": digest(value), "value": value}, path, indent=None)

    def _path(self, name: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}_{key[:24]}.json"


def _opened(content: Any) -> Any:
    """The value in what a file holds. Raises ValueError: its digest is missing or another's."""
    if not isinstance(content, dict) or set(content) != {"sha256", "value"}:
        raise ValueError("it has no digest")
    if content["sha256"] != digest(content["value"]):
        raise ValueError("it does not match its digest")
    return content["value"]
