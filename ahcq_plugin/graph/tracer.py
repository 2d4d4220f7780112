# SPDX-License-Identifier: Apache-2.0
"""Trace one unit (a transformer block, a neck, an attention) into a ``torch.fx.GraphModule``."""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from ahcq_plugin.graph.calls import Argument, Call, Opaque, TensorExample, Varying, bind, has_tensors
from ahcq_plugin.graph.examples import Examples, Unknown
from ahcq_plugin.graph.fixed import check_answer, check_fixed, check_given, put
from ahcq_plugin.graph.multihead import functional_attention, multihead_attention, why_kept
from ahcq_plugin.graph.rewrites import erase_unused_products, expand_fused_attention
from ahcq_plugin.graph.structure import Keys
from ahcq_plugin.graph.surroundings import emptied_caches, unwrapped
from ahcq_plugin.graph.untraceable import ROTARY_FUNCTIONS, treatment

# Functions of segment_anything and sam2 (and of their many copies) that branch on sizes: kept whole, as one node each.
WRAPPED_FUNCTIONS = (
    *("window_partition", "window_unpartition", "get_rel_pos", "add_decomposed_rel_pos"),
    *ROTARY_FUNCTIONS,
)
#: Functions of sizes (and of answers about them), which torch does not let a proxy into.
PLAIN_ARGUMENTS = (
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.linspace, torch.eye, torch.tensor),
    F.scaled_dot_product_attention,
)
#: Folders that hold no code of a model; the separator keeps `torchvision` out of `torch`.
OUR_DIR, TORCH_DIR = (str(path.parent) + os.sep for path in (Path(__file__), Path(torch.__file__)))


class BlockTracer(fx.Tracer):
    """``fx.Tracer`` for one block; also MQBench's ``custom_tracer``.

    Beyond ``fx.Tracer``: ``WRAPPED_FUNCTIONS`` found in the globals of the traced classes' modules stay one node;
    an ``assert`` on a traced value is taken to hold; Linear and Conv2d subclasses that inherit ``forward`` are leaves;
    ``F.scaled_dot_product_attention`` is rewritten to matmul, softmax, matmul, and so is
    ``nn.MultiheadAttention``, also as a function (``graph/multihead.py``); ``graph/untraceable.py`` has the
    exceptions for classes of SAM 2.

    Args:
        call: how the module is really called. Its tensors are the arguments of the graph; all else (None, numbers,
            strings) is fixed to what was passed. Questions about sizes, ranks and types of traced values are answered
            as they were in this call. The graph checks both (a call that differs raises ValueError).
            None: all parameters without a default are arguments, those with one are fixed to it, and questions that
            decide what is computed raise ``TraceError``.
        turned: keys (``graph/structure.py``) of questions that are answered with yes instead of no, and no instead of
            yes: where does the code go then?

    Attributes:
        asked: (check, key of the question, answer), of the last trace.
    """

    def __init__(self, call: Call | None = None, turned: frozenset[str] = frozenset()):
        super().__init__()
        self.call, self.turned = call, turned
        self.asked: list[tuple[fx.Node, str, Any]] = []

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root`` as it is (training flags included) into a graph whose sizes stay dynamic."""
        super().__init__(autowrap_functions=(*_wrapped_functions(root), *PLAIN_ARGUMENTS))
        self._autowrap_search += [torch, F]
        self.record_stack_traces = True  # errors name the line
        self.optional: list[fx.Node] = []  # erased in the end where nothing uses them
        self.answering = False  # examples are being computed: nothing is traced
        module = root if isinstance(root, nn.Module) else nn.Module()
        self.examples, self.keys, self.asked = Examples(module), Keys(module), []
        with unwrapped(WRAPPED_FUNCTIONS) if self.call is not None else nullcontext(), emptied_caches(root):
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in PLAIN_ARGUMENTS:  # fx would declare it whole once more whenever the graph is compiled
                node.meta.pop("is_wrapped", None)
        for node in self.optional:
            if not node.users:
                graph.erase_node(node)
        for check, _, answer in self.asked:
            _put_answer(check, answer)
        expand_fused_attention(graph)
        erase_unused_products(graph)
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return ExampleProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple, kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        """As ``fx.Tracer``; ``F.multi_head_attention_forward`` is written out, and gives a tuple."""
        if kind == "call_function" and target is F.multi_head_attention_forward:
            written_out = functional_attention(self, args, kwargs)
            if written_out is not None:
                return written_out
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def create_arg(self, a: Any) -> Any:
        """As ``fx.Tracer``; a dataclass that is a dict as well (outputs of ``transformers``) keeps its class."""
        if isinstance(a, dict) and is_dataclass(a) and not isinstance(a, type):
            given = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
            return self.create_node("call_function", a.__class__, (), {k: v for k, v in given.items() if v is not None})
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """As ``fx.Tracer``, through the ``forward`` that replaces the module's own."""
        if self.answering:
            return forward(*args, **kwargs)
        replaced: Callable[..., Any] | None = multihead_attention if _is_written_out(m) else treatment(m).forward
        return super().call_module(m, partial(replaced, self, m) if replaced else forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As ``fx.Tracer``."""
        return attr_val if self.answering else super().getattr(attr, attr_val, parameter_proxy_cache)

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
        """Placeholders: those of the recorded call, else those of the signature, defaults replaced by a check."""
        if self.call is not None:
            return self._args_of_call(root_fn, self.call)
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

    def _args_of_call(self, root_fn: Any, call: Call) -> tuple[Any, list[Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        has_default = False
        for argument in bind(root_fn, call):
            default = self._default(argument, has_default)
            has_default = has_default or bool(default)
            proxy = self.create_proxy("placeholder", argument.name, default, {})
            if argument.kind == "absent":
                value = self._fix_default(proxy)
                if value is proxy:
                    self.examples.give(proxy.node, argument.default)
                if value is not argument.default:
                    named[argument.name] = value
            elif argument.kind == "positional":
                positional.append(self._argument(argument, proxy))
            else:
                named[argument.name] = self._argument(argument, proxy)

        def called(*args: Any) -> Any:
            return root_fn(*args, **named)

        called.__annotations__ = root_fn.__annotations__  # fx copies that of the output
        return called, [self.root, *positional]

    def _default(self, argument: Argument, is_needed: bool) -> tuple[Any, ...]:
        """The placeholder's default, () for none: the parameter's own; behind one with a default all need one."""
        if argument.default is not inspect.Parameter.empty:
            return (argument.default,)
        return (None if has_tensors(argument.value) else argument.value,) if is_needed else ()

    def _argument(self, argument: Argument, proxy: fx.Proxy) -> Any:
        """What the module's code gets for an argument: proxies for tensors, all else as it was."""
        self.examples.give(proxy.node, argument.value)
        if argument.name in treatment(self.root).free:
            return proxy
        if has_tensors(argument.value) and proxy.node.args:
            self.create_proxy("call_function", check_given, (proxy, argument.name), {})
        return self._parts(argument.value, proxy, argument)

    def _parts(self, value: Any, proxy: fx.Proxy, argument: Argument) -> Any:
        if isinstance(value, TensorExample | Varying):
            return proxy
        if isinstance(value, Opaque):
            raise TraceError(
                f"argument `{argument.name}` is an {value}: only tensors and plain values can be arguments"
            )
        if not has_tensors(value):
            kind = "its default " if argument.default is value else ""
            self.create_proxy("call_function", check_fixed, (proxy, value, argument.name, kind), {})
            return value
        if isinstance(value, dict):
            return {key: self._parts(item, proxy[key], argument) for key, item in value.items()}
        return type(value)(self._parts(item, proxy[i], argument) for i, item in enumerate(value))

    def to_bool(self, obj: fx.Proxy) -> bool:
        """True inside a plain ``assert`` and for counts; other control flow goes as in the recorded call, if it depends
        on no value of a tensor, else ``TraceError``."""
        if obj.node.target is operator.gt and obj.node.args[1] == 0:
            counted = obj.node.args[0]
            if counted.op == "placeholder" and counted.target in treatment(self.root).counts:
                self.optional.append(obj.node)
                return True
        line = _line_of_the_model().split()
        if line[:1] == ["assert"] and "not" not in line and "or" not in line:
            return True
        return bool(self.answer(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator:
        """Of as many elements as there were in the recorded call."""
        return (obj[i] for i in range(self.answer(obj, len)))

    def answer(self, obj: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        """``question`` (bool, int, float, len) about a traced value, as in the recorded call; the graph checks it.

        Raises:
            TraceError: no call was recorded, or the answer depends on the values of tensors.
        """
        if self.call is None:
            raise TraceError("symbolically traced variables cannot be used as inputs to control flow")
        self.answering = True
        try:
            value = self.examples.value(obj.node)
        except Unknown as error:
            raise TraceError(f"the way depends on values of tensors ({error})") from error
        finally:
            self.answering = False
        if isinstance(value, torch.Tensor) and question is not len:
            raise TraceError("symbolically traced variables cannot be used as inputs to control flow")
        answer = question(value)
        asked = obj if isinstance(value, bool) else self.create_proxy("call_function", question, (obj,), {})
        key = self.keys.of(asked.node)
        if key in self.turned and isinstance(answer, bool):
            answer = not answer
        check = self.create_proxy("call_function", check_answer, (asked, answer, _line_of_the_model().strip()), {})
        self.asked.append((check.node, key, answer))
        return answer


class _Answers:
    """What Python asks of numbers and sequences, answered as in the recorded call."""

    tracer: BlockTracer

    def __len__(self) -> int:
        return self.tracer.answer(self, len)  # type: ignore[arg-type]

    def __index__(self) -> int:
        return self.tracer.answer(self, int)  # type: ignore[arg-type]

    __int__ = __index__

    def __float__(self) -> float:
        return self.tracer.answer(self, float)  # type: ignore[arg-type]


class ExampleProxy(_Answers, fx.Proxy):
    """A traced value whose tracer knows an example of it."""

    def __setitem__(self, place: Any, value: Any) -> None:
        """This proxy stands for the changed copy from here on; what was made of it before keeps its values."""
        self.node = self.tracer.create_proxy("call_function", put, (self, place, value), {}).node

    def __getattr__(self, name: str) -> _ExampleAttribute:
        return _ExampleAttribute(self, name)


class _ExampleAttribute(_Answers, fx.proxy.Attribute):
    """An attribute of a traced value."""

    def __getattr__(self, name: str) -> _ExampleAttribute:
        return _ExampleAttribute(self, name)


def _put_answer(check: fx.Node, answer: Any) -> None:
    """``length > 1 and causal`` is the first of the two where that is False: what reads it gets False."""
    asked = check.args[0]
    assert isinstance(asked, fx.Node)
    for user in list(asked.users) if isinstance(answer, bool) and asked.target is not bool else ():
        if user.target is not check_answer:
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda node: answer if node is asked else node)


def _line_of_the_model() -> str:
    """The line of the model's code that is being traced, '' if unknown."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH_DIR, OUR_DIR)):
        frame = frame.f_back
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0) if frame else ""


def _is_written_out(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and why_kept(module) is None


def _wrapped_functions(root: nn.Module | Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    forwards = [m.forward for m in root.modules()] if isinstance(root, nn.Module) else [root]
    spaces = [getattr(inspect.unwrap(forward), "__globals__", {}) for forward in forwards]
    return tuple({space[name] for space in spaces for name in WRAPPED_FUNCTIONS if callable(space.get(name))})
