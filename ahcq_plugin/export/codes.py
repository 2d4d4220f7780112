# SPDX-License-Identifier: Apache-2.0
"""Quantizers of exported operands: floats to codes, codes to floats (numpy, float32, as the fake quantizers do)."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export.operands import (
    Activation,
    GroupedOperand,
    HLUQOperand,
    Operand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    UniformOperand,
    WeightOperand,
    check_range,
    of_products,
    top,
)


def encode(operand: Activation, x: np.ndarray) -> np.ndarray:
    """int64 codes of float32 x, same shape; grouped operands have their channels on the last axis, operands per head
    their products on all but the last two.

    uniform, per_head, grouped: ``clip(rint(x / scale) + zero_point, 0, 2^bits - 1)``: true division, half to even, each
    step rounded to float32. hluq, table: the number of boundaries <= x is the rank, ``rank_codes`` has its code.

    Raises:
        SpecError: x is not float32, has a NaN, or another number of channels than a grouped operand, or a number of
            products that is no multiple of the heads.
    """
    x = np.asarray(x)
    if x.dtype != np.float32 or np.isnan(x).any():
        raise SpecError(f"x must be float32 without NaN, got {x.dtype}{' with NaN' if x.dtype == np.float32 else ''}")
    if isinstance(operand, HLUQOperand | TableOperand):
        return operand.rank_codes[np.searchsorted(operand.boundaries, x, side="right")]
    scale, zero_point = _uniform(operand, x.shape)
    with np.errstate(over="ignore"):  # overflow to infinity saturates
        codes = np.rint(x / scale) + zero_point.astype(np.float32)
    return np.clip(codes, 0, top(operand.bits)).astype(np.int64)


def decode(operand: Operand, codes: np.ndarray) -> np.ndarray:
    """float32 values of the codes, same shape (the table in ``operands``).

    Weights (N, K) and grouped operands (..., K) are bit-equal to their fake quantizers, so are uniform ones, also per
    head (..., rows, columns); hluq and table are within float32 rounding of theirs, whose levels were rounded once.

    Raises:
        SpecError: a code outside [0, 2^bits - 1].
    """
    codes = np.asarray(codes)
    check_range("codes", codes, 0, top(operand.bits))
    if isinstance(operand, TableOperand):
        return operand.offset + operand.table[codes].astype(np.float32) * operand.unit
    if isinstance(operand, HLUQOperand):
        split = operand.log_levels
        power = np.ldexp(operand.scale_log, -np.minimum(codes, split))
        above = operand.scale_log + (codes - split).astype(np.float32) * operand.scale_uniform
        return operand.offset + np.where(codes < split, power, np.where(codes == split, np.float32(0), above))
    if isinstance(operand, WeightOperand):
        return (codes - operand.zero_points[:, None]).astype(np.float32) * operand.scales[:, None]
    scale, zero_point = _uniform(operand, codes.shape)
    return (codes - zero_point).astype(np.float32) * scale


def _uniform(
    operand: UniformOperand | PerHeadOperand | GroupedOperand, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(operand, UniformOperand):
        return np.asarray(operand.scale), np.asarray(operand.zero_point)
    if isinstance(operand, PerHeadOperand):
        return of_products(operand.scales, shape[:-2]), of_products(operand.zero_points, shape[:-2])
    if shape[-1:] != (operand.channels,):
        raise SpecError(f"the last axis must have {operand.channels} channels, got shape {shape}")
    labels = operand.labels()
    return operand.scales[labels], operand.zero_points[labels]
