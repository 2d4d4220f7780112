# SPDX-License-Identifier: Apache-2.0
"""Our own kernels for CPUs (``csrc``): codes, digits, 8-bit products, epilogue and attention, each in one pass."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ahcq_plugin.export.operands import top
from ahcq_plugin.functional import kernels
from ahcq_plugin.integer.backends.base import Backend, is_identity
from ahcq_plugin.integer.lanes import Pass
from ahcq_plugin.support import cpp_library
from ahcq_plugin.support.cpp_library import threads

if TYPE_CHECKING:
    from ahcq_plugin.integer.attention import IntegerAttention, Positions
    from ahcq_plugin.integer.encoder import ChannelCoder, Encoder
    from ahcq_plugin.integer.layers import IntegerLinear
    from ahcq_plugin.integer.products import IntegerProduct

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
COLUMNS = 64  # of a panel: ``kColumns`` in tile.h
_SHIFT = 128
_CODES = 256
_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Pass(ctypes.Structure):
    _fields_ = [("begin", _I64), ("end", _I64), ("segment", _I64), ("factor", _I64)]
    _fields_ += [("lane", _I32), ("identity", _I32), ("table", _P)]


class _Linear(ctypes.Structure):
    _fields_ = [("n", _I64), ("k", _I64), ("quads", _I64), ("lanes", _I32), ("passes", _I32), ("fits_int32", _I32)]
    _fields_ += [("levels", _I32), ("pass_", _P), ("order", _P), ("panels", _P), ("added", _P), ("starts", _P)]
    _fields_ += [("lane_scales", _P), ("offset", _P), ("scales", _P), ("bias", _P)]
    _fields_ += [("out_scale", _P), ("out_zero", _P), ("out_top", ctypes.c_float)]


class _Product(ctypes.Structure):
    _fields_ = [("k", _I64), ("n", _I64), ("passes", _I32), ("levels", _I32), ("shift", _I32), ("heads", _I32)]
    _fields_ += [("pass_", _P), ("left_zero", _P), ("right_zero", _P), ("scale", _P)]


class _Matrices(ctypes.Structure):
    _fields_ = [("codes", _P), ("batch_stride", _I64), ("row_stride", _I64), ("column_stride", _I64)]


class _Numbers(ctypes.Structure):
    _fields_ = [("at", _P), ("row_stride", _I64), ("column_stride", _I64)]


class _Encoding(ctypes.Structure):
    _fields_ = [("bits", _I32), ("per_channel", _I32), ("scale", _P), ("zero_point", _P), ("boundaries", _P)]
    _fields_ += [("rank_codes", _P)]


class _Attention(ctypes.Structure):
    _fields_ = [("qk", _Product), ("av", _Product), ("encoding", _Encoding), ("factors", _I32), ("divides", _P)]
    _fields_ += [("factor", _P), ("key_rows", _I64), ("key_columns", _I64), ("rows", _P), ("columns", _P)]


class _Held:
    """A structure, with the arrays that it points to."""

    def __init__(self, structure: Any, *arrays: Any):
        self.structure, self.arrays = structure, arrays


class NativeBackend(Backend):
    """Kernels compiled for this processor; fast where it has AVX-512 VNNI."""

    name = "native"
    devices = ("cpu",)

    def __init__(self) -> None:
        self._library = cpp_library.load(SOURCES / "integer.cpp", kernels.SOURCE.parent)

    def encode(self, encoder: Encoder, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.uint8)
        if not x.numel():
            return out
        held = encoder.form("native", lambda: _encoding(encoder))
        columns = x.shape[-1] if held.structure.per_channel else x.numel()
        if held.structure.per_channel and (not x.is_contiguous() or columns != encoder.scale.numel()):
            return super().encode(encoder, x)
        rows, columns = (x.numel() // columns, columns) if held.structure.per_channel else _pieces(x.numel())
        done = rows * columns
        self._library.ahcq_encode(
            ctypes.byref(held.structure), _P(x.data_ptr()), _I64(rows), _I64(columns), _I64(columns),
            _P(out.data_ptr()), threads(),
        )  # fmt: skip
        rest = x.numel() - done
        if rest:
            self._library.ahcq_encode(
                ctypes.byref(held.structure), _P(x.data_ptr() + 4 * done), _I64(1), _I64(rest), _I64(rest),
                _P(out.data_ptr() + done), _I32(1),
            )  # fmt: skip
        return out

    def encode_matrices(self, encoder: Encoder, x: Tensor, other: Tensor | None) -> Tensor:
        held = encoder.form("native", lambda: _encoding(encoder))
        out = torch.empty(x.shape, dtype=torch.uint8)
        batch, rows, columns = x.shape
        for item in range(batch):
            parts = [_numbers(x[item]), _Numbers() if other is None else _numbers(other[item])]
            self._library.ahcq_encode_matrix(
                ctypes.byref(held.structure), *map(ctypes.byref, parts), _I64(rows), _I64(columns),
                _P(out[item].data_ptr()), threads(),
            )  # fmt: skip
        return out

    def linear(self, layer: IntegerLinear, codes: Tensor) -> Tensor:
        held = layer.weight.form("native", lambda: self._linear_form(layer))
        return self._linear(held.structure, codes, torch.empty(len(codes), layer.n))

    def linear_codes(self, layer: IntegerLinear, coder: ChannelCoder, codes: Tensor) -> Tensor:
        held = layer.weight.form("native", lambda: self._linear_form(layer))
        structure = _Linear.from_buffer_copy(held.structure)
        structure.out_scale, structure.out_zero = coder.scale.data_ptr(), coder.zero_point.data_ptr()
        structure.out_top = coder.top
        return self._linear(structure, codes, torch.empty(len(codes), layer.n, dtype=torch.uint8))

    def _linear(self, structure: _Linear, codes: Tensor, out: Tensor) -> Tensor:
        codes = codes.contiguous()
        self._library.ahcq_linear(
            ctypes.byref(structure), _P(codes.data_ptr()), _I64(len(codes)), _P(out.data_ptr()), threads()
        )
        return out

    def product(self, product: IntegerProduct, left: Tensor, right: Tensor) -> Tensor:
        batch, m, k = left.shape
        out = torch.empty(batch, m, right.shape[-1])
        held = _product(product, k, right.shape[-1])
        self._library.ahcq_multiply(
            ctypes.byref(held.structure), ctypes.byref(_matrices(left)), ctypes.byref(_matrices(right)), _I64(batch),
            _I64(m), _P(out.data_ptr()), threads(),
        )  # fmt: skip
        return out

    def attention(
        self,
        attention: IntegerAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scalars: tuple,
        positions: Positions | None,
    ) -> Tensor:
        (batch, m, width), (keys, n) = q.shape, v.shape[-2:]
        out = torch.empty(batch, m, n)
        qk, av = _product(attention.qk, width, keys), _product(attention.av, keys, n)
        encoding = attention.encoder.form("native", lambda: _encoding(attention.encoder))
        divides = np.array([how == "div" for how in attention.factors], np.int32)
        factors = np.array([float(scalar) for scalar in scalars], np.float32)
        grids: list[Tensor] = []
        if positions is not None:
            grids = [positions.rows.contiguous(), positions.columns.contiguous()]
        sizes = [grid.shape[-1] for grid in grids] or [0, 0]
        pointers = [grid.data_ptr() for grid in grids] or [0, 0]
        call = _Attention(
            qk.structure, av.structure, encoding.structure, len(factors), divides.ctypes.data, factors.ctypes.data,
            *sizes, *pointers,
        )  # fmt: skip
        matrices = [ctypes.byref(_matrices(codes)) for codes in (q, k, v)]
        self._library.ahcq_attend(ctypes.byref(call), *matrices, _I64(batch), _I64(m), _P(out.data_ptr()), threads())
        return out

    def softmax(self, scores: Tensor) -> Tensor:
        """The probabilities (..., n) that ``attention`` makes of float32 scores."""
        out = scores.contiguous().clone()
        self._library.ahcq_softmax(_P(out.data_ptr()), _I64(out.numel() // out.shape[-1]), _I64(out.shape[-1]))
        return out

    def _linear_form(self, layer: IntegerLinear) -> _Held:
        weight = layer.weight
        passes = [(index, one) for index, lane in enumerate(layer.lanes) for one in layer.passes(lane)]
        array, quads, tables = _passes(passes)
        signed = weight.signed()
        zero_points = weight.zero_points.int()
        wide = int(signed.max()) > _SHIFT - 1 or int(signed.min()) < -_SHIFT
        shift = torch.full_like(zero_points, _SHIFT) if wide else zero_points
        added = _SHIFT - zero_points if wide else None
        order = layer.permutation if len(layer.permutation) else None
        panels = torch.empty(-(-layer.n // COLUMNS) * quads * 4 * COLUMNS, dtype=torch.int8)
        starts, scales = layer.starts.t().contiguous(), np.array([lane.scale for lane in layer.lanes], np.float32)
        offset = layer.offset if len(layer.offset) else None
        structure = _Linear(
            layer.n, layer.k, quads, len(layer.lanes), len(passes), layer.fits_int32,
            len(layer.lanes[0].digits.tables[0]), ctypes.addressof(array), _address(order), _address(panels),
            _address(added), _address(starts), scales.ctypes.data, _address(offset), _address(weight.scales),
            _address(layer.bias),
        )  # fmt: skip
        self._library.ahcq_pack_weight(
            ctypes.byref(structure), _P(weight.packed.data_ptr()), _I32(weight.bits), _P(shift.data_ptr()),
            _P(panels.data_ptr()),
        )  # fmt: skip
        return _Held(structure, array, tables, order, panels, added, starts, scales, offset, weight.scales, layer.bias)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pieces(count: int) -> tuple[int, int]:
    """Rows and columns of a stretch of numbers, for threads to share."""
    columns = min(count, 2**15)
    return count // columns, columns


def _passes(passes: list[tuple[int, Pass]]) -> tuple[Any, int, list[np.ndarray]]:
    """Passes, each with its lane, as C has them; the quads of a panel; the tables that they point to.

    Passes on the same columns share a segment of the panel.
    """
    segments: dict[tuple[int, int], int] = {}
    quads, tables, made = 0, [], (_Pass * len(passes))()
    for place, (lane, one) in enumerate(passes):
        if (one.begin, one.end) not in segments:
            segments[one.begin, one.end] = quads
            quads += -(-(one.end - one.begin) // 4)
        tables.append(np.pad(one.table, (0, _CODES - len(one.table))))
        made[place] = _Pass(
            one.begin, one.end, segments[one.begin, one.end], one.factor, lane, is_identity(one.table),
            tables[-1].ctypes.data,
        )  # fmt: skip
    return made, quads, tables


def _product(product: IntegerProduct, k: int, n: int) -> _Held:
    def make() -> _Held:
        array, _, tables = _passes([(0, one) for one in product.passes(k)])
        heads = max(len(product.left_zero), len(product.right_zero), len(product.scale))
        zeros = [zero.expand(heads).contiguous() for zero in (product.left_zero, product.right_zero)]
        scale = product.scale.expand(heads).contiguous()
        shift = _SHIFT if product.right_bits == 8 else 0
        structure = _Product(
            k, n, len(array), top(product.left_bits) + 1, shift, heads, ctypes.addressof(array), *map(_address, zeros),
            _address(scale),
        )  # fmt: skip
        return _Held(structure, array, tables, zeros, scale)

    return product.form(("native", k, n), make)


def _matrices(codes: Tensor) -> _Matrices:
    return _Matrices(codes.data_ptr(), *codes.stride())


def _numbers(x: Tensor) -> _Numbers:
    return _Numbers(x.data_ptr(), *x.stride())


def _encoding(encoder: Encoder) -> _Held:
    ranked = len(encoder.boundaries) > 0
    boundaries = np.full(_CODES, np.inf, np.float32)
    boundaries[: len(encoder.boundaries)] = encoder.boundaries.numpy()
    codes = np.zeros(_CODES, np.uint8)
    codes[: len(encoder.rank_codes)] = encoder.rank_codes.numpy()
    scale, zero_point = encoder.scale.contiguous(), encoder.zero_point.contiguous()
    structure = _Encoding(
        encoder.bits, scale.numel() > 1, _address(scale), _address(zero_point),
        boundaries.ctypes.data if ranked else None, codes.ctypes.data,
    )  # fmt: skip
    return _Held(structure, boundaries, codes, scale, zero_point)
