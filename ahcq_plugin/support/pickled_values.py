# SPDX-License-Identifier: Apache-2.0
"""What the pickle inside a torch file may ask for: names, and this package's own functions that stand behind them."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_REPEATED = 2**28  # elements of a tensor that repeats its storage (strides of 0)

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {str(dtype): dtype for dtype in STORAGES.values()}
# Classes of which training checkpoints hold objects that nobody needs for the weights.
SWALLOWED = {
    "argparse.Namespace",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
}
_NUMPY_KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}


class Refused(ValueError):
    """The pickle asks for something that a checkpoint has no use for."""


@dataclass(frozen=True, eq=False)
class Inert:
    """Stands for an object that is not made; it takes in whatever would have been its content."""

    name: str


@dataclass(frozen=True)
class Global:
    """A name that the pickle may mention; never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """``elements`` numbers of ``dtype``: what tensors are views of."""

    dtype: torch.dtype
    elements: int
    content: torch.UntypedStorage


def resolve(argument: str) -> Any:
    """The dtype or the :class:`Global` that the opcode GLOBAL means by ``argument``, "module name".

    Raises:
        Refused: any name that is not listed in this file.
    """
    name = argument.replace(" ", ".", 1)
    if name in _DTYPES:
        return _DTYPES[name]
    if name in STORAGES or name in SWALLOWED or name in CALLS:
        return Global(name)
    if name.startswith("torch."):
        raise Refused(f"it asks for {name[:80]!r}: only dense tensors without attributes are read, and plain values")
    raise Refused(f"it asks for {name[:80]!r}, which a checkpoint has no use for; it may be malicious")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *more: Any) -> Tensor:
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise Refused("a tensor is not made of a storage, a size and strides")
    if more not in ((), (None,), ({},)) or type(hooks) is not OrderedDict or hooks:
        raise Refused("a tensor has hooks, or is conjugated or negated lazily; save a plain copy")
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *size, *stride)):
        raise Refused(f"a tensor has offset {offset!r}, size {size!r}, strides {stride!r}")
    count = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and not 0 <= end < storage.elements:
        raise Refused(
            f"a tensor reaches outside its storage of {storage.elements} elements: offset {offset}, size {size}, "
            f"strides {stride}"
        )
    if count > max(storage.elements, MAX_REPEATED):
        raise Refused(f"a tensor of size {size} repeats a storage of {storage.elements} elements")
    tensor = torch.empty(0, dtype=storage.dtype, device=storage.content.device)
    tensor.set_(storage.content, offset, size, stride)
    return tensor.requires_grad_(_flag(requires_grad))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> nn.Parameter:
    if type(data) is not Tensor or type(hooks) is not OrderedDict or hooks:
        raise Refused("a parameter is not made of a tensor, or has hooks")
    return nn.Parameter(data, _flag(requires_grad))


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Refused(f"requires_grad is a {type(value).__name__}")
    return value


def module_versions(value: Any) -> Any:
    """``value``, if it can be what ``Module.state_dict`` keeps as ``_metadata``: module name to versions."""
    if type(value) not in (dict, OrderedDict):
        raise Refused("the metadata of a state dict are no dict")
    for name, versions in value.items():
        if type(name) is not str or type(versions) is not dict:
            raise Refused("the metadata of a state dict are not a dict for each module")
    return value


def _size(items: Any) -> torch.Size:
    if type(items) not in (tuple, list) or not all(type(n) is int for n in items):
        raise Refused("a torch.Size is not made of integers")
    return torch.Size(items)


def _device(*arguments: Any) -> torch.device:
    if not 1 <= len(arguments) <= 2 or [type(v) for v in arguments] != [str, int][: len(arguments)]:
        raise Refused(f"a torch.device is made of {arguments!r:.80}")
    return torch.device(*arguments)


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused("bytes are not made of text in latin1")
    return text.encode("latin1")


def _counter(counts: Any) -> Counter:
    if type(counts) is not dict:
        raise Refused("a Counter is not made of a dict")
    return Counter(counts)


def _numpy_dtype(kind: Any, *_: Any) -> np.dtype | Inert:
    return np.dtype(kind) if type(kind) is str and kind in _NUMPY_KINDS else Inert("numpy.dtype")


def _numpy_scalar(dtype: Any, content: Any) -> np.generic | Inert:
    if isinstance(dtype, np.dtype) and type(content) is bytes and len(content) == dtype.itemsize:
        return np.frombuffer(content, dtype)[0]
    return Inert("a NumPy scalar")


def _attribute(owner: Any, name: Any) -> Inert:
    """Methods of a swallowed class are in its objects' state (MMEngine's HistoryBuffer)."""
    if type(owner) is not Global or owner.name not in SWALLOWED:
        raise Refused(f"it asks for getattr of {getattr(owner, 'name', type(owner).__name__)}; it may be malicious")
    return Inert(f"{owner.name}.{name}")


NATIVE = (("<", None, None, None), ("|", None, None, None))
CALLS: dict[str, Callable[..., Any]] = {
    "__builtin__.bytes": lambda: b"",
    "__builtin__.getattr": _attribute,
    "_codecs.encode": _encode,
    "collections.Counter": _counter,
    "collections.OrderedDict": lambda: OrderedDict(),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.dtype": _numpy_dtype,
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.device": _device,
}
