# SPDX-License-Identifier: Apache-2.0
"""Trace one unit (a transformer block, a neck, an attention) into a ``torch.fx.GraphModule``."""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.fx.node import has_side_effect
from torch.nn import functional as F

from ahcq_plugin.graph.bare_weights import layer_bare_weights
from ahcq_plugin.graph.multihead import functional_attention, multihead_attention, why_kept
from ahcq_plugin.graph.rewrites import expand_fused_attention
from ahcq_plugin.graph.untraceable import treatment

UNIT_KEY = "ahcq_unit"
# Functions of segment_anything and sam2 (and of their many copies) that branch on sizes: kept whole, as one node each.
WRAPPED_FUNCTIONS = ("window_partition", "window_unpartition", "get_rel_pos", "add_decomposed_rel_pos")
#: Folders that hold no code of a model; the separator keeps `torchvision` out of `torch`.
OUR_DIR, TORCH_DIR = (str(path.parent) + os.sep for path in (Path(__file__), Path(torch.__file__)))


class BlockTracer(fx.Tracer):
    """``fx.Tracer`` for one block; also MQBench's ``custom_tracer``.

    Beyond ``fx.Tracer``: ``WRAPPED_FUNCTIONS`` found in the globals of the traced classes' modules stay one node;
    arguments with a default are fixed to it (a call with another value raises ValueError); an ``assert`` on a traced
    value is taken to hold; Linear and Conv2d subclasses that inherit ``forward`` are leaves;
    ``F.scaled_dot_product_attention`` is rewritten to matmul, softmax, matmul, and so is
    ``nn.MultiheadAttention``, also as a function (``graph/multihead.py``); ``graph/untraceable.py`` has the
    exceptions for classes of SAM 2.
    """

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root`` as it is (training flags included) into a graph whose sizes stay dynamic."""
        super().__init__(autowrap_functions=_wrapped_functions(root))
        self.record_stack_traces = True  # errors name the line
        self.optional: list[fx.Node] = []  # erased in the end where nothing uses them
        graph = super().trace(root, concrete_args)
        for node in self.optional:
            if not node.users:
                graph.erase_node(node)
        expand_fused_attention(graph)
        return graph

    def create_proxy(
        self, kind: str, target: Any, args: tuple, kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        """As ``fx.Tracer``; ``F.multi_head_attention_forward`` is written out, and gives a tuple."""
        if kind == "call_function" and target is F.multi_head_attention_forward:
            written_out = functional_attention(self, args, kwargs)
            if written_out is not None:
                return written_out
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """As ``fx.Tracer``, through the ``forward`` that replaces the module's own."""
        replaced: Callable[..., Any] | None = multihead_attention if _is_written_out(m) else treatment(m).forward
        return super().call_module(m, partial(replaced, self, m) if replaced else forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays one node."""
        if _is_written_out(m):
            return False
        for base in (nn.Linear, nn.Conv2d):
            if isinstance(m, base) and type(m).forward is base.forward:
                return True
        return (
            isinstance(m, FakeQuantizeBase) or treatment(m).is_leaf or super().is_leaf_module(m, module_qualified_name)
        )

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders; those with a default are replaced by it, with a check in the graph."""
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return fn, args if concrete_args is not None else [self._fix_default(arg) for arg in args]

    def _fix_default(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Proxy) or not arg.node.args or arg.node.target in treatment(self.root).free:
            return arg
        fixed = treatment(self.root).fixed
        value = fixed.get(arg.node.target, arg.node.args[0])
        kind = "" if arg.node.target in fixed else "its default "
        self.create_proxy("call_function", check_fixed, (arg, value, arg.node.target, kind), {})
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        """True inside a plain ``assert`` and for counts; any other control flow on a traced value raises
        ``TraceError``."""
        if obj.node.target is operator.gt and obj.node.args[1] == 0:
            counted = obj.node.args[0]
            if counted.op == "placeholder" and counted.target in treatment(self.root).counts:
                self.optional.append(obj.node)
                return True
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith((TORCH_DIR, OUR_DIR)):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split() if frame else []
        if line[:1] == ["assert"] and "not" not in line and "or" not in line:
            return True
        return super().to_bool(obj)


@has_side_effect
def check_fixed(value: Any, fixed: Any, name: str, kind: str) -> None:
    """Graph node: refuse a value other than the one that the unit was traced with.

    Raises:
        ValueError: ``value`` is not ``fixed``.
    """
    plain = isinstance(value, bool | int | float | str) and type(value) is type(fixed)
    if value is fixed or (plain and value == fixed):
        return
    raise ValueError(
        f"argument `{name}` was fixed to {kind}{fixed!r} when this unit was traced, got "
        f"{type(value).__name__}; call the unit without it, or leave the unit out with `units=`"
    )


class UnitError(RuntimeError):
    """A model cannot be quantized as it is: a unit does not trace, is not reached, or its values are not finite."""


class UncoveredError(UnitError, ValueError):
    """A unit would compute something in floating point that is neither allowed nor left by the caller."""


def trace_unit(module: nn.Module, name: str, leave: Sequence[str] = ()) -> fx.GraphModule:
    """Trace a unit in eval mode; parameters are shared with ``module`` and keep their paths.

    Args:
        module: the unit. Its training flags are restored afterwards.
        name: its module name, for messages and ``meta``.
        leave: what of it may stay in floating point (see ``graph/allowed.py``), kept in ``meta``.
    Returns:
        A GraphModule with the unit's ``state_dict`` keys and ``meta["ahcq_unit"]`` with the keys ``name``,
        ``leave`` and ``placements`` (empty).
    Raises:
        UnitError: the unit does not trace; names it and the source line that stopped the tracer.
    """
    attributes = set(vars(module))
    try:
        with eval_mode(module):
            graph = BlockTracer().trace(module)
        traced = fx.GraphModule(module, graph, class_name=type(module).__name__)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnitError(
            f"unit '{name}' ({type(module).__name__}) does not trace{_source_line(error)}: {reason}. "
            "Rewrite that code without control flow on tensor values, or leave the unit out with `units=`"
        ) from error
    finally:
        for constant in set(vars(module)) - attributes:  # constants that fx stores on the traced module
            delattr(module, constant)
    keep_state(module, traced)
    layer_bare_weights(module, traced)
    for path, child in module.named_modules():
        if path and treatment(child).is_asked_for and type(traced.get_submodule(path)) is nn.Module:
            traced.get_submodule(path).__class__ = type(child)
    traced.meta[UNIT_KEY] = {"name": name, "leave": tuple(leave), "placements": []}
    return traced


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own training flag restored after."""
    flags = [(child, child.training) for child in module.modules()]
    try:
        if any(flag for _, flag in flags):
            module.eval()
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def _is_written_out(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and why_kept(module) is None


def _wrapped_functions(root: nn.Module | Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    forwards = [m.forward for m in root.modules()] if isinstance(root, nn.Module) else [root]
    spaces = [getattr(inspect.unwrap(forward), "__globals__", {}) for forward in forwards]
    return tuple({space[name] for space in spaces for name in WRAPPED_FUNCTIONS if callable(space.get(name))})


def _source_line(error: BaseException) -> str:
    """' at file:line: `code`' of the innermost frame of user code, or '' if there is none."""
    ours = (TORCH_DIR, OUR_DIR, "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""


def keep_state(source: nn.Module, traced: fx.GraphModule) -> None:
    """Give ``traced`` the state-dict keys of ``source``: fx drops unused tensors and makes all buffers persistent.

    Fake quantizers in ``traced`` keep their state as it is.
    """
    known = set()
    quantizers = [m for m in traced.modules() if isinstance(m, FakeQuantizeBase)]
    of_quantizers = {id(buffer) for quantizer in quantizers for buffer in quantizer.buffers()}
    for prefix, module in source.named_modules(remove_duplicate=False):
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        known.update(f"{prefix}.{name}".lstrip(".") for name in buffers)
        if not parameters and not buffers:
            continue
        target = _submodule(traced, prefix)
        if target is module:  # a leaf, shared
            continue
        for name, parameter in parameters.items():
            target.register_parameter(name, parameter)
        for name, buffer in buffers.items():
            target.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for prefix, module in list(traced.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") not in known and id(buffer) not in of_quantizers:
                module.register_buffer(name, buffer, persistent=False)


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for atom in filter(None, path.split(".")):
        if not hasattr(root, atom):
            root.add_module(atom, nn.Module())
        root = getattr(root, atom)
    return root
