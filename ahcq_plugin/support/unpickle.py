# SPDX-License-Identifier: Apache-2.0
"""The pickle inside a torch file, read by a machine that can make tensors and plain values and nothing else.

``pickle`` runs what a file asks for, and a list of allowed names in front of it leaves many ways around (attributes set
by BUILD, methods of what is allowed). Here a name is only a word: nothing is imported or looked up, every opcode is
written out below, and a call is a look-up in the table of ``pickled_values``.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.support.pickled_values import (
    CALLS,
    NATIVE,
    STORAGES,
    SWALLOWED,
    Global,
    Inert,
    Refused,
    Storage,
    module_versions,
    resolve,
)

MAX_OPCODES = 2_000_000  # SAM-H has 20 thousand
MAX_DEPTH = 100  # of containers within containers
MAX_ITEMS = 2_000_000  # leaves and containers, each as often as it is reached

ReadStorage = Callable[[str, torch.dtype, int], torch.UntypedStorage]


def unpickle(stream: BinaryIO, read_storage: ReadStorage) -> Any:
    """The object of the pickle that begins where ``stream`` is, of protocol 2 as ``torch.save`` writes it.

    Made are: None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict (with a state dict's ``_metadata``),
    Counter, Tensor, Parameter, ``torch.Size``, dtypes, devices and NumPy scalars; other objects of a few classes are
    :class:`Inert`. Everything else, cycles, and containers deeper than ``MAX_DEPTH`` are refused.

    Args:
        read_storage: called with key, dtype and number of elements of a storage, once for each key; returns its bytes.

    Raises:
        Refused: content that is not allowed, with its name.
        ValueError, KeyError, IndexError, TypeError, RuntimeError, OverflowError: the pickle is damaged.
    """
    return _Machine(read_storage).run(stream)


def drop_inert(content: Any) -> dict[Any, str]:
    """Delete the entries of ``content``, if it is a dict, that hold an :class:`Inert`, in place.

    Returns: key to the name of what it held.

    Raises:
        Refused: an inert object elsewhere, something that is no value, or containers that are too deep, too many, or
            hold themselves.
    """
    left = MAX_ITEMS

    def visit(value: Any, depth: int) -> str | None:
        """The name of the first inert object."""
        nonlocal left
        left -= 1
        if depth > MAX_DEPTH or left < 0:
            raise Refused(f"it is nested deeper than {MAX_DEPTH} levels, holds itself or repeats its parts endlessly")
        if type(value) is Inert:
            return value.name
        if isinstance(value, dict):
            parts: Iterable[Any] = chain(value.keys(), value.values(), getattr(value, "__dict__", {}).values())
        elif type(value) in (list, tuple):
            parts = value
        elif isinstance(value, _LEAVES):
            return None
        else:
            raise Refused(f"it holds a bare {getattr(value, 'name', type(value).__name__)}, which is no value")
        return next((found for part in parts if (found := visit(part, depth + 1))), None)

    dropped = {}
    for key in list(content) if isinstance(content, dict) else ():
        if found := visit((key, content[key]), 1):
            dropped[key] = found
            del content[key]
    rest = vars(content).values() if type(content) is OrderedDict else () if isinstance(content, dict) else [content]
    if found := visit(tuple(rest), 0):
        raise Refused(f"it holds {found} where that cannot be left out")
    return dropped


_PROTOCOL_2 = b"\x80\x02"
_KEYS = (str, int, float, bool, type(None), np.generic, Inert)
_LEAVES = (str, bytes, int, float, type(None), Tensor, torch.Size, torch.dtype, torch.device, np.generic)


class _Machine:
    """Stack and memo of one pickle; see the documentation of ``pickletools`` for the opcodes."""

    def __init__(self, read_storage: ReadStorage):
        self.read_storage = read_storage
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        if (begin := stream.read(2)) != _PROTOCOL_2:
            raise Refused(f"its pickle begins with {begin!r}, not as torch.save's of protocol 2 do")
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_OPCODES:
                raise Refused(f"its pickle has more than {MAX_OPCODES} opcodes")
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in _ACTIONS:
                _ACTIONS[name](self)
            elif name == "GLOBAL":
                self.stack.append(resolve(argument))
            elif name == "STOP":
                break
            else:
                raise Refused(f"its pickle has the opcode {name}, which torch.save does not write")
        if len(self.stack) != 1 or self.marked:
            raise ValueError("the pickle does not leave one object")
        return self.stack.pop()

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def tuple_of_marked(self) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(self.last(count)))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            raise Refused(f"it appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            return
        if type(target) not in (dict, OrderedDict):
            raise Refused(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            parts = key if type(key) is tuple else (key,)
            if not all(isinstance(part, _KEYS) for part in parts):
                raise Refused(f"a key of a dict is a {type(key).__name__} of {[type(part).__name__ for part in parts]}")
            target[key] = value

    def last(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise Refused(f"it calls a {type(function).__name__}")
        if function.name in SWALLOWED:
            self.stack.append(Inert(function.name))
        elif function.name in CALLS:
            self.stack.append(CALLS[function.name](*arguments))
        else:
            raise Refused(f"it calls {function.name}")

    def new_object(self) -> None:
        _, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not Global or cls.name not in SWALLOWED:
            raise Refused(f"it makes an object of {getattr(cls, 'name', type(cls).__name__)}")
        self.stack.append(Inert(cls.name))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Inert:
            return
        if type(target) is OrderedDict and type(state) is dict and list(state) == ["_metadata"]:
            setattr(target, "_metadata", module_versions(state["_metadata"]))  # noqa: B010  no attribute of its type
        elif isinstance(target, np.dtype) and type(state) is tuple and state[1:5] in NATIVE:
            return  # what numpy.dtype("f8") already is
        else:
            raise Refused(f"it sets the state of a {type(target).__name__}")

    def storage(self) -> None:
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise Refused("it refers to something outside the pickle that is no storage")
        _, kind, key, _, elements, *_ = pid  # where the storage was when it was saved does not matter
        dtype = STORAGES.get(kind.name) if type(kind) is Global else None
        if dtype is None or type(key) is not str or type(elements) is not int:
            raise Refused(f"it refers to a storage of {getattr(kind, 'name', kind)!r}, key {key!r}, size {elements!r}")
        if key not in self.storages:
            self.storages[key] = Storage(dtype, elements, self.read_storage(key, dtype, elements))
        found = self.storages[key]
        if (found.dtype, found.elements) != (dtype, elements):
            raise Refused(f"it states storage {key!r} twice, with different types or sizes")
        self.stack.append(found)


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "APPEND": lambda machine: machine.append(machine.last(1)),
    "APPENDS": lambda machine: machine.append(machine.since_mark()),
    "SETITEM": lambda machine: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine: machine.set_items(machine.since_mark()),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
