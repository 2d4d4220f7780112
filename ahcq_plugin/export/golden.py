# SPDX-License-Identifier: Apache-2.0
"""The integer golden model: matmuls from codes alone (numpy). Generated C++ repeats it bit for bit.

Integers. w is a weight code minus the zero point of its output channel, subtracted where the weight is loaded (a
signed operand of bits + 1 bits). Every accumulator of ``linear`` starts at its folded constant (``lane_starts``:
minus zero point times the sum of its w; 0 for hluq and table) and adds one term for each k:

=========== ======================================================================================
uniform     ``code * w``
grouped     ``code * w``, one accumulator a group, on reordered channels
hluq        lane ``multiply``: ``(code - L) * w`` for code > L; lane ``shift``: ``w << (L - 1 - code)`` for code < L,
            ``w << (L - 1)`` for code > L; code L adds nothing to either
table       ``table[code] * w``
=========== ======================================================================================

In a convolution with groups the k of an output are those of its group (``Patches``).

``qk`` and ``av`` have two run-time operands a (codes, or ``table[code]`` with zero point 0) and b (codes). Four sums
over k: ``P = sum a*b``, ``A = sum a`` of the left row, ``B = sum b`` of the right row (qk) or column (av); then
``acc = ((P - zero_b * A) - zero_a * B) + k * zero_a * zero_b``. Of operands that are per head, product i of the leading
axes (in C order) has the zero point and the scale of head ``i % H``.

Floats. f(i) is the float32 nearest to the integer i (half to even; exact up to 2^24). Every operation below is
float32, rounded (half to even) by itself, left to right as written; no fused multiply-add.

=========== ======================================================================================
uniform     ``t = f(acc) * scale``
grouped     ``t = f(acc_0) * scale_0``, then for g = 1, 2, ...: ``t = t + f(acc_g) * scale_g``
hluq        ``t = f(multiply) * scale_uniform + f(shift) * shift_scale``, then ``t = t + offset_n``
table       ``t = f(acc) * unit``, then ``t = t + offset_n``
linear      ``y = t * weight_scale_n``, then ``y = y + bias_n``
qk, av      ``y = f(acc) * s`` with ``s = left * right`` made once, left = scale or unit, right = scale
=========== ======================================================================================

Products come before the sum that they stand in. ``shift_scale = scale_log * 2^-(L - 1)`` and
``offset_n = offset * f(sum of w_n)`` are constants, made once in float32 (``dequant_constants``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ahcq_plugin.export.matmul import Matmul, heads_of, lane_names, lane_slices, lane_starts, zeros_of
from ahcq_plugin.export.operands import (
    Activation,
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    of_products,
    top,
)

_EXACT_FLOAT64 = 53


@dataclass(frozen=True, eq=False)
class GoldenResult:
    """What a matmul gives.

    Attributes:
        accumulators: int64 (..., m, n, lanes); lanes as ``lanes`` names them: ``sum``; ``group0``, ...; or
            ``multiply``, ``shift``. Folded constants and corrections are in.
        output: float32 (..., m, n).
        lanes: names of the last axis of ``accumulators``.
    """

    accumulators: np.ndarray
    output: np.ndarray
    lanes: tuple[str, ...]


def run(matmul: Matmul, left_codes: np.ndarray, right_codes: np.ndarray | None = None) -> GoldenResult:
    """Execute one matmul.

    Args:
        left_codes: integers (..., m, k), any number of rows; grouped channels in the layer's own order; of a
            convolution with groups (..., m, groups * k).
        right_codes: None for ``linear``; (..., n, k) for ``qk``; (..., k, n) for ``av``.
    Raises:
        SpecError: a shape or dtype that does not fit, or a code outside [0, 2^bits - 1].
    """
    left_codes, right_codes = checked_codes(matmul, left_codes, right_codes)
    if matmul.kind == "linear":
        accumulators = _linear_accumulators(matmul, left_codes)
        return GoldenResult(accumulators, _dequantize_linear(matmul, accumulators), lane_names(matmul.left))
    right = np.swapaxes(right_codes, -1, -2) if matmul.kind == "qk" else right_codes
    accumulators = _two_sided(matmul, left_codes, right)
    output = accumulators.astype(np.float32) * of_products(product_scale(matmul), left_codes.shape[:-2])
    return GoldenResult(accumulators[..., None], output, ("sum",))


def checked_codes(
    matmul: Matmul, left_codes: np.ndarray, right_codes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Both operands of ``run`` as int64, same shapes; raises what ``run`` does."""
    left_codes = _checked(matmul, "left", left_codes, matmul.left.bits, (None, matmul.row_length))
    if matmul.kind == "linear":
        if right_codes is not None:
            raise SpecError(f"matmul '{matmul.name}' has a constant weight: `right_codes` must be None")
        return left_codes, None
    shape = (None, matmul.k) if matmul.kind == "qk" else (matmul.k, None)
    right_codes = _checked(matmul, "right", right_codes, matmul.right.bits, shape)
    if left_codes.shape[:-2] != right_codes.shape[:-2]:
        raise SpecError(
            f"matmul '{matmul.name}': the leading axes of the codes differ: {left_codes.shape}, {right_codes.shape}"
        )
    products, heads = int(np.prod(left_codes.shape[:-2], dtype=np.int64)), heads_of(matmul.left, matmul.right)
    if products % heads:
        raise SpecError(
            f"matmul '{matmul.name}': the leading axes of the codes {left_codes.shape} hold {products} products, "
            f"which must be a multiple of the {heads} heads"
        )
    return left_codes, right_codes


def lane_operands(left: Activation, codes: np.ndarray) -> list:
    """The non-negative int64 operands (..., k of the lane) that enter each lane, zero points not subtracted."""
    if isinstance(left, HLUQOperand):
        split = left.log_levels
        powers = np.left_shift(1, np.clip(split - 1 - codes, 0, None))
        base = np.where(codes > split, 1 << (split - 1), np.where(codes < split, powers, 0))
        return [np.clip(codes - split, 0, None), base]
    if isinstance(left, TableOperand):
        return [left.table[codes]]
    return lane_slices(left, codes)


def dequant_constants(matmul: Matmul) -> np.ndarray:
    """float32 (n,) ``offset_n`` of a ``linear`` matmul whose left operand is hluq or table.

    Raises:
        SpecError: another kind or family, which has no offset.
    """
    if matmul.kind != "linear" or not isinstance(matmul.left, HLUQOperand | TableOperand):
        raise SpecError(f"matmul '{matmul.name}': kind {matmul.kind} with family {matmul.left.family} has no offset")
    return matmul.left.offset * matmul.right.signed().sum(1).astype(np.float32)


def product_scale(matmul: Matmul) -> np.float32 | np.ndarray:
    """float32 ``s`` of ``qk`` and ``av``; (H,) where an operand is per head."""
    return _scale(matmul.left) * _scale(matmul.right)


def _scale(operand: Activation) -> np.float32 | np.ndarray:
    if isinstance(operand, PerHeadOperand):
        return operand.scales
    return operand.unit if isinstance(operand, TableOperand) else operand.scale


def _linear_accumulators(matmul: Matmul, codes: np.ndarray) -> np.ndarray:
    if matmul.groups > 1:
        return _grouped_convolution(matmul, codes)
    operands = lane_operands(matmul.left, codes)
    weights = lane_slices(matmul.left, matmul.right.signed())
    starts = lane_starts(matmul.left, matmul.right)
    lanes = [
        _exact(operand, weight.T, matmul.accumulator_bits) + starts[:, lane]
        for lane, (operand, weight) in enumerate(zip(operands, weights, strict=True))
    ]
    return np.stack(lanes, axis=-1)


def _grouped_convolution(matmul: Matmul, codes: np.ndarray) -> np.ndarray:
    """Every group's part of a row times the weights of its outputs; the left operand is uniform."""
    parts = codes.reshape(*codes.shape[:-1], matmul.groups, 1, matmul.k)
    weights = matmul.right.signed().reshape(matmul.groups, -1, matmul.k)
    sums = _exact(parts, weights.swapaxes(1, 2), matmul.accumulator_bits).reshape(*codes.shape[:-1], matmul.n)
    return (sums + lane_starts(matmul.left, matmul.right)[:, 0])[..., None]


def _two_sided(matmul: Matmul, left_codes: np.ndarray, right: np.ndarray) -> np.ndarray:
    (left,) = lane_operands(matmul.left, left_codes)
    left_zero, right_zero = (of_products(zeros_of(o), left_codes.shape[:-2]) for o in (matmul.left, matmul.right))
    product = _exact(left, right, matmul.accumulator_bits)
    row_sums, column_sums = left.sum(-1)[..., :, None], right.sum(-2)[..., None, :]
    return ((product - right_zero * row_sums) - left_zero * column_sums) + matmul.k * left_zero * right_zero


def _dequantize_linear(matmul: Matmul, accumulators: np.ndarray) -> np.ndarray:
    left = matmul.left
    sums = [accumulators[..., lane].astype(np.float32) for lane in range(accumulators.shape[-1])]
    if isinstance(left, HLUQOperand):
        total = sums[0] * left.scale_uniform + sums[1] * left.shift_scale
        total = total + dequant_constants(matmul)
    elif isinstance(left, TableOperand):
        total = sums[0] * left.unit + dequant_constants(matmul)
    else:
        scales = left.scales if isinstance(left, GroupedOperand) else [left.scale]
        total = sums[0] * scales[0]
        for acc, scale in zip(sums[1:], scales[1:], strict=True):
            total = total + acc * scale
    return total * matmul.right.scales + matmul.bias


def _exact(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    """int64 ``a @ b``. Where every partial sum is below 2^52, float64 gives the same integers, much faster.

    Without the folded constant a partial sum is at most twice what ``accumulator_bits`` allow.
    """
    if bits < _EXACT_FLOAT64:
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    return a @ b


def _checked(matmul: Matmul, side: str, codes: np.ndarray, bits: int, shape: tuple) -> np.ndarray:
    codes = np.asarray(codes)
    fits = codes.ndim >= 2 and all(want in (None, got) for want, got in zip(shape, codes.shape[-2:], strict=True))
    if not fits or not np.issubdtype(codes.dtype, np.integer):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(
            f"matmul '{matmul.name}': the {side} codes must be integers (..., {wanted}), got {codes.dtype} "
            f"{codes.shape}"
        )
    if codes.size and (codes.min() < 0 or codes.max() > top(bits)):
        raise SpecError(
            f"matmul '{matmul.name}': the {side} codes must lie in [0, {top(bits)}], got [{codes.min()}, {codes.max()}]"
        )
    return codes.astype(np.int64)
