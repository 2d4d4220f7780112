# SPDX-License-Identifier: Apache-2.0
"""What a node of a traced unit does, as far as finding roles needs it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Iterator

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

SHAPE_METHODS = frozenset().union(
    ("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
    ("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "roll"),
    ("unbind", "chunk", "split", "tensor_split", "select", "narrow"),
    ("expand", "expand_as", "repeat", "repeat_interleave"),
    ("to", "type", "type_as", "float", "half", "bfloat16"),
)
SHAPE_FUNCTIONS = frozenset(
    {getattr(torch, name) for name in SHAPE_METHODS if callable(getattr(torch, name, None))}
    | {operator.getitem, F.dropout, torch.dropout, F.pad}
)
SHAPE_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
WINDOW_FUNCTIONS = ("window_partition", "window_unpartition")
SELECTIONS = frozenset({"select", "narrow"})
SCALE_OPS = frozenset(
    {operator.mul, operator.imul, operator.truediv, operator.itruediv, operator.neg, torch.mul, torch.div, torch.neg}
    | {"mul", "mul_", "div", "div_", "neg"}
)
_DIVISIONS = frozenset({operator.truediv, operator.itruediv, torch.div, "div", "div_"})
SIZE_METHODS = frozenset({"size", "dim", "numel", "item", "stride"})
SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
_MATMUL, _BMM, _BADDBMM = ("input", "other"), ("input", "mat2"), ("input", "batch1", "batch2")
#: What multiplies two tensors -> the names of its arguments, of which the last two are the factors.
MATMULS = {
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, operator.matmul, "matmul", "__matmul__"), _MATMUL),
    **dict.fromkeys((torch.bmm, torch.mm, "bmm", "mm"), _BMM),
    **dict.fromkeys((torch.baddbmm, "baddbmm"), _BADDBMM),
}
SOFTMAXES = frozenset({torch.softmax, F.softmax, "softmax"})
EINSUMS = frozenset({torch.einsum, torch.functional.einsum})
ACTIVATION_MODULES = (nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish)
ACTIVATIONS = frozenset(
    {
        F.gelu,
        F.relu,
        F.relu_,
        F.relu6,
        F.leaky_relu,
        F.elu,
        F.selu,
        F.silu,
        F.mish,
        F.hardswish,
        torch.relu,
        torch.relu_,
    }
    | {"relu", "relu_"}
)
#: Go into a gate beside activations: squeeze and excite, GLU.
_SIGMOIDS = frozenset({torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.special.expit, "sigmoid"})
_SIGMOID_MODULES = (nn.Sigmoid, nn.Hardsigmoid)
_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"})
_GLUS = frozenset({F.glu})
FUNCTIONAL_LAYERS = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})

Edge = tuple[fx.Node, int | str]
"""(consumer, index of the positional argument or name of the keyword argument)."""


class GraphIndex:
    """Answers questions about the nodes of ``graph``; ``root`` holds the modules and tensors that its targets name."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root, self.graph = root, graph
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._scalar: dict[fx.Node, bool] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The called module of a call_module node, else None."""
        return self._modules.get(node.target) if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        """Linear or Conv2d."""
        return isinstance(self.module(node), nn.Linear | nn.Conv2d)

    def is_matmul(self, node: fx.Node) -> bool:
        """A product of two traced tensors."""
        return _calls(node, MATMULS) and all(isinstance(a, fx.Node) for _, a in matmul_operands(node))

    def is_softmax(self, node: fx.Node) -> bool:
        """Softmax as function, method or module."""
        return _calls(node, SOFTMAXES) or isinstance(self.module(node), nn.Softmax)

    def is_activation(self, node: fx.Node) -> bool:
        """GELU, ReLU and their kin, as function, method or module, and ``x * sigmoid(c x)`` written out."""
        if _calls(node, ACTIVATIONS) or isinstance(self.module(node), ACTIVATION_MODULES):
            return True
        gates = [operand for operand in self._operands(node) if self.is_sigmoid(operand)]
        return any(self._unscaled(gate.all_input_nodes[0]) in self._operands(node) for gate in gates)

    def is_sigmoid(self, node: fx.Node) -> bool:
        """Sigmoid and hard sigmoid, as function, method or module."""
        return _calls(node, _SIGMOIDS) or isinstance(self.module(node), _SIGMOID_MODULES)

    def is_gated(self, node: fx.Node) -> bool:
        """A product, element by element, of a tensor and an activation or sigmoid of another; GLU."""
        if _calls(node, _GLUS) or isinstance(self.module(node), nn.GLU):
            return True
        gates = any(self.is_activation(factor) or self.is_sigmoid(factor) for factor in self._factors(node))
        return gates and not self.is_activation(node)

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """What the two tensors that ``node`` multiplies element by element come from through changes of shape and
        scalar factors; none for any other node, and where one of them is a parameter (layer scale)."""
        factors = [self.walk_back(operand)[-1] for operand in self._operands(node)]
        return factors if all(factor.op != "get_attr" for factor in factors) else []

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The two tensors that ``node`` multiplies element by element; none for any other node."""
        operands = [*node.args, *node.kwargs.values()] if _calls(node, _PRODUCTS) else []
        tensors = [a for a in operands if isinstance(a, fx.Node) and not self.is_scalar(a)]
        return tensors if len(tensors) == 2 else []

    def _unscaled(self, node: fx.Node) -> fx.Node:
        while (source := self.scale_source(node)) is not None:
            node = source
        return node

    def is_scalar(self, value: object) -> bool:
        """A number, or a node computed from numbers and sizes only, or a one-element parameter or buffer."""
        if not isinstance(value, fx.Node):
            return isinstance(value, int | float)
        if value not in self._scalar:
            self._scalar[value] = self._find_scalar(value)
        return self._scalar[value]

    def _find_scalar(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(self.root)
            return isinstance(tensor, torch.Tensor) and tensor.numel() == 1
        if node.op == "call_method":
            return node.target in SIZE_METHODS
        if node.op != "call_function":
            return False
        if node.target is getattr:
            return node.args[1] in SIZE_ATTRIBUTES
        arithmetic = getattr(node.target, "__module__", None) in (math.__name__, "_operator", "builtins")
        return arithmetic and bool(node.all_input_nodes) and all(map(self.is_scalar, node.all_input_nodes))

    def is_selection(self, node: fx.Node) -> bool:
        """Takes one part out of a fused tensor: an integer index, ``select``, ``narrow``."""
        if node.op == "call_method":
            return node.target in SELECTIONS
        if node.op != "call_function":
            return False
        if node.target is not operator.getitem:
            return node.target in (torch.select, torch.narrow)
        source, index = node.args
        if isinstance(source, fx.Node) and function_name(source) in WINDOW_FUNCTIONS:
            return False  # (windows, padded size)
        return any(type(i) is int for i in (index if isinstance(index, tuple) else (index,)))

    def shape_source(self, node: fx.Node) -> fx.Node | None:
        """The tensor that ``node`` only reshapes, permutes, indexes, casts or drops out; None for any other node."""
        if node.op == "call_function":
            shape_only = node.target in SHAPE_FUNCTIONS or function_name(node) in WINDOW_FUNCTIONS
            shape_only = shape_only or (node.target is getattr and node.args[1] in ("T", "mT"))
        elif node.op == "call_method":
            shape_only = node.target in SHAPE_METHODS
        else:
            shape_only = isinstance(self.module(node), SHAPE_MODULES)
        return self._tensor_input(node) if shape_only and not self.is_scalar(node) else None

    def scale_source(self, node: fx.Node) -> fx.Node | None:
        """The tensor that ``node`` multiplies or divides by a scalar; None for any other node."""
        if not _calls(node, SCALE_OPS):
            return None
        operands = [*node.args, *node.kwargs.values()]
        tensors = [a for a in operands if isinstance(a, fx.Node) and not self.is_scalar(a)]
        if len(tensors) != 1 or sum(map(self.is_scalar, operands)) != len(operands) - 1:
            return None
        divides = _calls(node, _DIVISIONS) and tensors[0] not in node.args[:1]  # a scalar by the tensor
        return None if divides else tensors[0]

    @staticmethod
    def _tensor_input(node: fx.Node) -> fx.Node | None:
        source = node.args[0] if node.args else next((v for v in node.kwargs.values() if isinstance(v, fx.Node)), None)
        return source if isinstance(source, fx.Node) else None

    def walk_back(self, node: fx.Node, through_selections: bool = True) -> list[fx.Node]:
        """``node`` and its sources through shape-only and scaling nodes; the last one is the tensor itself."""
        path = [node]
        while through_selections or not self.is_selection(path[-1]):
            source = self.shape_source(path[-1]) or self.scale_source(path[-1])
            if source is None:
                break
            path.append(source)
        return path

    def walk_forward(self, node: fx.Node) -> Iterator[fx.Node]:
        """Every node that consumes ``node`` directly or through shape-only nodes."""
        stack = [node]
        while stack:
            for user in stack.pop().users:
                yield user
                if self.shape_source(user) is not None:
                    stack.append(user)

    def ancestors(self, node: fx.Node, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """``node`` and what its value is computed from, up to nodes that ``stop`` accepts; sizes are not followed."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            yield current
            if not stop(current):
                fresh = [n for n in current.all_input_nodes if n not in seen and not self.is_scalar(n)]
                seen.update(fresh)
                stack.extend(fresh)

    def edges(self, node: fx.Node) -> list[Edge]:
        """Every use of the tensor ``node``; nodes that only read its size are left out."""
        uses = []
        for user in node.users:
            if self.is_scalar(user):
                continue
            for key, value in (*enumerate(user.args), *user.kwargs.items()):
                held: list[fx.Node] = []
                map_arg(value, held.append)
                if node in held:
                    uses.append((user, key))
        return uses


def function_name(node: fx.Node) -> str | None:
    """Name of the called function of a call_function node, else None."""
    return getattr(node.target, "__name__", None) if node.op == "call_function" else None


def matmul_operands(node: fx.Node) -> list[tuple[int | str, object]]:
    """(index or keyword of the argument, operand) of the left and the right factor of a matmul."""
    names = MATMULS[node.target]
    keys = [i if i < len(node.args) else names[i] for i in (len(names) - 2, len(names) - 1)]
    return [(key, argument(node, key)) for key in keys]


def layer_input(node: fx.Node) -> tuple[int | str, object]:
    """(index or keyword of the argument, tensor) that a called Linear or Conv2d reads."""
    key = 0 if node.args else "input"
    return key, argument(node, key)


def argument(node: fx.Node, key: int | str) -> object:
    """The positional or keyword argument of a node; None where that keyword is not given."""
    return node.args[key] if isinstance(key, int) else node.kwargs.get(key)


def _calls(node: fx.Node, targets: Container) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets
