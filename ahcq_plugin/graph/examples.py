# SPDX-License-Identifier: Apache-2.0
"""Examples of the values of traced nodes: what a question of size, rank or type is answered from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from ahcq_plugin.graph.calls import TensorExample, Varying


class Unknown(Exception):
    """The value of a node depends on the values of tensors."""


class Examples:
    """Values of the nodes of a graph that is being traced, computed when asked for, on tensors without values.

    Args:
        root: the module that is traced, whose modules and tensors the nodes name.
    """

    def __init__(self, root: nn.Module):
        self._root, self._mode = root, FakeTensorMode(allow_non_fake_inputs=True)
        first = next(root.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._known: dict[fx.Node, Any] = {}

    def give(self, node: fx.Node, example: Any) -> None:
        """The example of an argument of the unit: a recorded value."""
        self._known[node] = self._made(example)

    def value(self, node: fx.Node) -> Any:
        """What ``node`` is in the recorded call: a number, a bool, a tensor without values, a tuple of these.

        Raises:
            Unknown: it depends on values of tensors, or on an argument without an example.
        """
        wanted, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current not in self._known and current not in wanted:
                wanted.add(current)
                stack.extend(current.all_input_nodes)
        with torch.no_grad(), self._mode:
            for current in node.graph.nodes:
                if current in wanted:
                    self._known[current] = self._compute(current)
        return self._known[node]

    def _made(self, example: Any) -> Any:
        if isinstance(example, TensorExample):
            with self._mode:
                return example.make(self._device)
        if isinstance(example, Varying):
            return example.example
        if isinstance(example, tuple | list):
            return type(example)(map(self._made, example))
        if isinstance(example, dict):
            return {key: self._made(value) for key, value in example.items()}
        return example

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            raise Unknown(f"argument `{node.target}` has no example")
        args, kwargs = map_arg((node.args, node.kwargs), self._known.__getitem__)
        try:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self._root)
                return self._mode.from_tensor(value) if isinstance(value, Tensor) else value
            if node.op == "call_module":
                return self._root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # whatever the code of a model raises on tensors without values
            raise Unknown(f"{node.name}: {str(error).strip().splitlines()[0] if str(error) else error!r}") from error
