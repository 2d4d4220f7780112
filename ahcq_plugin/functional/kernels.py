# SPDX-License-Identifier: Apache-2.0
"""Fake quantizers on CPUs as compiled kernels (``csrc``), in one pass over memory where operators need six to ten.

What is quantized, and the gradient of x, have the bits of the operators of ``uniform.py`` and ``tables.py``, which do
where these cannot: other devices and dtypes, layouts that ``rows`` does not know, no C++ compiler. Gradients of scales
are summed in float64, in an order that does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ahcq_plugin.functional.pieces import is_dense
from ahcq_plugin.support import cpp_library

if TYPE_CHECKING:
    from ahcq_plugin.functional.tables import Table

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent / "csrc" / "fake_quantize.cpp"
_FILLED = 32  # numbers that `look_up` of ranks.h reads at a time
_I32, _I64, _P, _F = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Drop(ctypes.Structure):
    _fields_ = [("dice", _P), ("threshold", _I32)]


class _Uniform(ctypes.Structure):
    _fields_ = [("scale", _P), ("zero_point", _P), ("top", _F), ("across", _I32)]
    _fields_ += [("channels", _I64), ("rows", _I64), ("columns", _I64)]


class _Table(ctypes.Structure):
    _fields_ = [("boundaries", _P), ("levels", _P), ("bits", _I32), ("bands", _I32), ("bottom", _F), ("top", _F)]
    _fields_ += [("ends", _P), ("count", _I64)]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and a warning, where they cannot be compiled."""
    try:
        return cpp_library.load(SOURCE)
    except RuntimeError as error:
        logger.warning("fake quantization runs in PyTorch's operators, several times slower: %s", error)
        return None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take ``tensors``: dense float32 on a CPU."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and is_dense(t) for t in tensors)
    return plain and library() is not None


def usable_for_tables(x: Tensor) -> bool:
    """Whether the kernels take x and are worth calling: number by number PyTorch's operators are faster."""
    return usable(x) and bool(library().ahcq_quick_tables())


def rows(x: Tensor, scale: Tensor) -> tuple[int, int, int, int] | None:
    """How a dense x lies in memory for parameters that broadcast against it: across, channels, rows and columns of
    ``_Uniform``; None where the parameters have several axes."""
    if scale.numel() == 1:
        return 0, 1, 1, x.numel()
    shape = (1,) * (x.ndim - scale.ndim) + tuple(scale.shape)
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    if len(shape) != x.ndim or len(axes) != 1 or shape[axes[0]] != x.shape[axes[0]] or not x.numel():
        return None
    channels, columns = scale.numel(), x.stride(axes[0])
    across = columns == 1
    return int(across), channels, x.numel() // (channels if across else columns), channels if across else columns


class _Kernel:
    """A fake quantizer of tensors of one shape and layout, and its gradients.

    Args:
        structure: what the C++ functions take, with pointers into ``held``.
        sums: how many sums make the gradients of what is learned.
    """

    name: str  # of the C++ functions, this and <name>_gradients

    def __init__(self, structure: ctypes.Structure, held: Sequence[Tensor], sums: int):
        self._structure, self._held, self._sums = structure, held, sums

    def quantize(self, x: Tensor, dice: Tensor | None, threshold: int) -> Tensor:
        """x_hat in the layout of x; ``dice`` (uint8, in this layout too) and ``threshold`` as ``Drop`` has them."""
        out = torch.empty_like(x)
        self._call(self.name, x, _drop(dice, threshold), out)
        return out

    def gradients(
        self, x: Tensor, grad: Tensor, dice: Tensor | None, threshold: int, learned: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of x, and the float64 sums where scales are learned; ``grad`` is in the layout of x."""
        grad_x, sums = torch.empty_like(x), torch.empty(self._sums, dtype=torch.float64) if learned else None
        self._call(f"{self.name}_gradients", x, grad, _drop(dice, threshold), grad_x, sums)
        return grad_x, sums

    def _call(self, name: str, *arguments: Tensor | _Drop | None) -> None:
        passed = [_P(a.data_ptr()) if isinstance(a, Tensor) else a and ctypes.byref(a) for a in arguments]
        getattr(library(), name)(ctypes.byref(self._structure), *passed, cpp_library.threads())


class Uniform(_Kernel):
    """``uniform.fake_quantize`` of tensors that lie as ``rows`` says; the sums are the gradient of each scale."""

    name = "ahcq_uniform"

    def __init__(self, layout: tuple[int, int, int, int], scale: Tensor, zero_point: Tensor, qmax: int):
        across, channels, count, columns = layout
        held = scale.detach().contiguous(), zero_point.contiguous()
        structure = _Uniform(*(t.data_ptr() for t in held), qmax, across, channels, count, columns)
        super().__init__(structure, held, channels)


class Sorted(_Kernel):
    """``tables.fake_quantize`` of dense tensors of ``numel`` elements; ``ends`` of the bands of learned scales, if any.

    The sums are those of (x_hat - x) * grad in each band, and of the gradients above the top.
    """

    name = "ahcq_table"

    def __init__(self, table: Table, numel: int, ends: Sequence[Tensor] = ()):
        count = len(table.levels)
        filled = (pad(t, (0, max(count, _FILLED) - len(t)), value=math.inf) for t in (table.boundaries, table.levels))
        held = *filled, torch.cat([*ends, table.top]).float()
        boundaries, levels, last = (t.data_ptr() for t in held)
        bits, bottom, top = count.bit_length() - 1, float(table.bottom), float(table.top)
        super().__init__(_Table(boundaries, levels, bits, len(ends), bottom, top, last, numel), held, len(ends) + 1)


def _drop(dice: Tensor | None, threshold: int) -> _Drop:
    return _Drop(None if dice is None else dice.data_ptr(), threshold)
