# SPDX-License-Identifier: Apache-2.0
"""How the modules of a model are really called: recorded on an item of data, kept as plain values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class TensorExample:
    """A tensor of a recorded call, without its values; ``make`` gives an empty one like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        """Uninitialised; under ``FakeTensorMode`` without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"tensor of shape {self.shape}"


@dataclass(frozen=True)
class Opaque:
    """An argument that is neither tensor, plain value nor a tuple, list or dict of these."""

    kind: str

    def __str__(self) -> str:
        return f"object of class {self.kind}"


@dataclass(frozen=True)
class Varying:
    """A number that differed between calls; the unit keeps it as an argument."""

    example: int | float

    def __str__(self) -> str:
        return f"number such as {self.example!r}"


@dataclass(frozen=True)
class Call:
    """One call of a module: ``module(*args, **kwargs)`` with tensors replaced by ``TensorExample``.

    Attributes:
        args: positional arguments, trees of tuples, lists and dicts.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call without the values of its tensors."""
        return cls(tuple(map(_example, args)), {name: _example(value) for name, value in kwargs.items()})

    def merged(self, other: Call, forward: Callable[..., Any]) -> Call:
        """The call of the method ``forward`` that stands for both.

        Raises:
            ValueError: they differ in more than the sizes of tensors and the values of numbers.
        """
        if len(self.args) != len(other.args) or list(self.kwargs) != list(other.kwargs):
            ours, theirs = _by_name(forward, self), _by_name(forward, other)
            if ours is not None and theirs is not None and list(ours.kwargs) == list(theirs.kwargs):
                return ours.merged(theirs, forward)
            raise ValueError(f"is called with {_shape_of(self)} and with {_shape_of(other)}")
        names = [f"argument {i + 1}" for i in range(len(self.args))]
        args = tuple(_merge(*pair) for pair in zip(self.args, other.args, names, strict=True))
        return Call(args, {name: _merge(self.kwargs[name], other.kwargs[name], f"`{name}`") for name in self.kwargs})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {"args": [_to_plain(a) for a in self.args], "kwargs": {k: _to_plain(v) for k, v in self.kwargs.items()}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Call:
        """Of what ``to_dict`` gave.

        Raises:
            ValueError: anything else.
        """
        try:
            args = tuple(map(_from_plain, plain["args"]))
            return cls(args, {str(name): _from_plain(value) for name, value in plain["kwargs"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a recorded call: {plain!r}") from error


@dataclass(frozen=True)
class Calls:
    """The recorded calls of a model's modules, by name; a module that was not reached has none.

    Attributes:
        by_name: name -> call.
        problems: name -> why its calls have no common form.
    """

    by_name: Mapping[str, Call]
    problems: Mapping[str, str]


def record_calls(model: nn.Module, run: Callable[[], Any]) -> Calls:
    """How every module of ``model`` is called while ``run`` runs it; nothing is kept of the values of tensors."""
    by_name: dict[str, Call] = {}
    problems: dict[str, str] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = Call.of(args, kwargs)
        try:
            by_name[name] = by_name[name].merged(call, type(module).forward) if name in by_name else call
        except ValueError as error:
            problems.setdefault(name, str(error))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: note(name, module, args, kwargs)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                handle = module.register_forward_pre_hook(hook(name), with_kwargs=True, prepend=True)
                hooks.callback(handle.remove)
        run()
    return Calls(by_name, problems)


@dataclass(frozen=True)
class Argument:
    """One parameter in a recorded call.

    Attributes:
        name: what the traced unit calls it.
        kind: "positional", "keyword" or "absent": how it was given.
        value: its example; None for absent ones.
        default: the default of the parameter, ``inspect.Parameter.empty`` without one.
    """

    name: str
    kind: str
    value: Any
    default: Any


def bind(forward: Callable[..., Any], call: Call) -> list[Argument]:
    """The parameters of ``forward`` in a call, in the order in which the traced unit takes them.

    Args:
        forward: a method, its first parameter is the module.
    Returns:
        Parameters by position in the order of the signature, what went into ``*args``, parameters by keyword only, what
        went into ``**kwargs``; those without a value (neither given nor a default) are left out.
    """
    empty, rest = inspect.Parameter.empty, "args"
    by_position: list[Argument] = []
    by_keyword: list[Argument] = []
    given, named = list(call.args), dict(call.kwargs)
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        name, kind = parameter.name, parameter.kind
        if kind is parameter.VAR_POSITIONAL:
            rest = name
        elif kind is not parameter.VAR_KEYWORD:
            group = by_keyword if kind is parameter.KEYWORD_ONLY else by_position
            if group is by_position and given:
                group.append(Argument(name, "positional", given.pop(0), parameter.default))
            elif name in named:
                group.append(Argument(name, "keyword", named.pop(name), parameter.default))
            elif parameter.default is not empty:
                group.append(Argument(name, "absent", None, parameter.default))
    by_position += [Argument(f"{rest}_{i}", "positional", value, empty) for i, value in enumerate(given)]
    return by_position + by_keyword + [Argument(name, "keyword", value, empty) for name, value in named.items()]


def _by_name(forward: Callable[..., Any], call: Call) -> Call | None:
    """The same call with everything by keyword, defaults included; None where something can only go by position."""
    arguments = bind(forward, call)
    known = {p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.POSITIONAL_ONLY}
    if any(a.kind == "positional" and a.name not in known for a in arguments):
        return None
    return Call((), {a.name: _example(a.default) if a.kind == "absent" else a.value for a in arguments})


def has_tensors(tree: Any) -> bool:
    """Whether a recorded argument holds anything that has to be an argument of the traced unit."""
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return any(map(has_tensors, tree))
    return isinstance(tree, TensorExample | Varying | Opaque)


def _example(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorExample(tuple(value.shape), tuple(value.stride()), value.dtype)
    if type(value) in PLAIN:
        return value
    if type(value) in (tuple, list, torch.Size):
        return (list if type(value) is list else tuple)(map(_example, value))
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _example(item) for key, item in value.items()}
    return Opaque(type(value).__name__)


def _merge(a: Any, b: Any, name: str) -> Any:
    if isinstance(a, TensorExample) and isinstance(b, TensorExample) and a.dtype == b.dtype:
        if len(a.shape) == len(b.shape):
            return a
    elif isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return type(a)(_merge(x, y, name) for x, y in zip(a, b, strict=True))
    elif isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return {key: _merge(a[key], b[key], name) for key in a}
    elif type(a) is type(b) and a == b:
        return a
    elif isinstance(a, Varying | int | float) and type(b) in (int, float):
        return a if isinstance(a, Varying) else Varying(a)
    raise ValueError(f"gets {_name(a)} and {_name(b)} as {name}")


def _name(value: Any) -> str:
    return str(value) if not isinstance(value, str) else repr(value)


def _shape_of(call: Call) -> str:
    return f"{len(call.args)} arguments" + (f" and {', '.join(call.kwargs)}" if call.kwargs else "")


def _to_plain(value: Any) -> Any:
    if isinstance(value, TensorExample):
        return {"tensor": [list(value.shape), list(value.stride), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, Opaque):
        return {"opaque": value.kind}
    if isinstance(value, Varying):
        return {"varying": value.example}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_to_plain(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {key: _to_plain(item) for key, item in value.items()}}
    return value


def _from_plain(plain: Any) -> Any:
    if not isinstance(plain, Mapping):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        shape, stride, dtype = content
        return TensorExample(tuple(shape), tuple(stride), _dtype(dtype))
    readers: dict[str, Callable[[Any], Any]] = {
        "opaque": Opaque,
        "varying": Varying,
        "dtype": _dtype,
        "tuple": lambda items: tuple(map(_from_plain, items)),
        "list": lambda items: list(map(_from_plain, items)),
        "dict": lambda items: {key: _from_plain(item) for key, item in items.items()},
    }
    return readers[kind](content)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"not a dtype: {name!r}")
    return dtype
