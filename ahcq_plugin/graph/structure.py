# SPDX-License-Identifier: Apache-2.0
"""What a traced node computes, as a key that is the same in every trace of one module."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg


class Keys:
    """Keys of the nodes of one graph: equal for nodes that do the same with the same, whatever their names.

    Args:
        root: the module whose tensors the nodes name; constants that a trace makes anew are the same in none other.
    """

    def __init__(self, root: nn.Module):
        self._root = root
        self._known: dict[fx.Node, str] = {}

    def of(self, node: fx.Node) -> str:
        """The key of ``node``."""
        stack = [node]
        while stack:
            missing = [source for source in stack[-1].all_input_nodes if source not in self._known]
            if missing:
                stack += missing
            else:
                self._known[stack[-1]] = self._made(stack[-1])
                stack.pop()
        return self._known[node]

    def _made(self, node: fx.Node) -> str:
        args: Any = map_arg((node.args, node.kwargs), lambda source: _Text(self._known[source]))
        target = node.target if isinstance(node.target, str) else f"{node.target!r} {id(node.target)}"
        value = id(operator.attrgetter(str(node.target))(self._root)) if node.op == "get_attr" else ""
        return hashlib.sha256(f"{node.op} {target} {value} {args!r}".encode()).hexdigest()


class _Text(str):
    """A key, told apart from a string that is an argument."""

    def __repr__(self) -> str:
        return f"<{self}>"
