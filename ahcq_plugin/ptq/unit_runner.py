# SPDX-License-Identifier: Apache-2.0
"""Runs a prepared unit node by node, called as the unit is."""

from __future__ import annotations

from typing import Any

from torch import fx


class UnitRunner(fx.Interpreter):
    """An interpreter that takes a unit's arguments by position or by name; a subclass looks at the nodes it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The unit's output."""
        names = [node.target for node in self.module.graph.nodes if node.op == "placeholder"]
        given = dict(zip(names, args, strict=False)) | kwargs
        return self.run(*(given[name] for name in names if name in given))
