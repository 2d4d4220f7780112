# SPDX-License-Identifier: Apache-2.0
"""Runs a prepared unit node by node, called as the unit is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx


class UnitRunner(fx.Interpreter):
    """An interpreter that takes a unit's arguments by position or by name; a subclass looks at the nodes it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The unit's output."""
        return self.run(*self.bound(args, kwargs))

    def run(self, *args: Any, **options: Any) -> Any:
        """As of ``fx.Interpreter``; errors say their unit and node, torch would add the module's whole traceback."""
        self.extra_traceback = False
        return super().run(*args, **options)

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The unit's arguments in order, defaults filled in.

        Raises:
            TypeError: one without a default is missing.
        """
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        given = dict(zip((node.target for node in placeholders), args, strict=False)) | dict(kwargs)
        for node in placeholders:
            if node.target not in given and not node.args:
                raise TypeError(f"the unit needs the argument `{node.target}`")
        return [given[node.target] if node.target in given else node.args[0] for node in placeholders]
