# SPDX-License-Identifier: Apache-2.0
"""``--cfg-options`` of the tools: MMEngine's, whose errors are lines of argparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction


class CfgOptions(DictAction):
    """``key.of.key=value``, several of them; what is none ends the tool with one line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[Any] | str | None,
        option_string: str | None = None,
    ) -> None:
        wrong = [word for word in values or () if "=" not in word or not all(word.partition("=")[0].split("."))]
        if wrong:
            raise argparse.ArgumentError(self, f"give key=value, as recipe.iterations=500, got {wrong[0]!r}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            raise argparse.ArgumentError(self, f"{' '.join(values)}: {error}") from error
