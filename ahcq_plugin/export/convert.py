# SPDX-License-Identifier: Apache-2.0
"""Operands from frozen fake quantizers. Nothing is approximated but AGQ levels with 30 fraction bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.matmul import Patches, Unsupported
from ahcq_plugin.export.operands import (
    MAX_TABLE_ENTRY,
    Activation,
    GroupedOperand,
    HLUQOperand,
    PerHeadOperand,
    SpecError,
    TableOperand,
    UniformOperand,
    WeightOperand,
)
from ahcq_plugin.functional import lnq
from ahcq_plugin.functional.tables import Table
from ahcq_plugin.functional.uniform import UniformParams
from ahcq_plugin.ptq.freeze import unfrozen
from ahcq_plugin.quantizers import (
    AGQFakeQuantize,
    CAGFakeQuantize,
    FakeQuantize,
    HLUQFakeQuantize,
    LNQFakeQuantize,
    PowerOfTwoFakeQuantize,
    UniformFakeQuantize,
)


def activation_operand(quantizer: FakeQuantize) -> Activation:
    """The operand of a frozen activation quantizer.

    Raises:
        SpecError: the quantizer is not frozen, or of a kind that no spec can hold.
    """
    check_frozen(quantizer)
    for kind, convert in _CONVERTERS.items():
        if isinstance(quantizer, kind):
            return convert(quantizer)
    raise SpecError(f"no spec can hold the family {quantizer.family!r}; it can hold {', '.join(_FAMILIES)}")


@torch.no_grad()
def product_operand(quantizer: FakeQuantize, params: UniformParams | None) -> Activation:
    """The operand of a product of two activations.

    Args:
        quantizer: frozen.
        params: scale and zero point of every value of the operand, (..., m, k), where they differ; else None.
    Returns:
        As ``activation_operand``, or a PerHeadOperand with as few heads as repeat over the products.
    Raises:
        Unsupported: scales or zero points differ within a product.
        SpecError: as ``activation_operand``.
    """
    if params is None:
        return activation_operand(quantizer)
    check_frozen(quantizer)
    m, k = params.scale.shape[-2:]
    grids = torch.stack([params.scale.double(), params.zero_point.double()], -1).reshape(-1, m * k, 2)
    if not bool((grids == grids[:, :1]).all()):
        raise Unsupported("scale or zero point of a product of activations differ within a head")
    grids = grids[:, 0]
    count = len(grids)
    divisors = (h for h in range(1, count + 1) if count % h == 0)
    heads = next(h for h in divisors if torch.equal(grids, grids[:h].repeat(count // h, 1)))
    scales, zero_points = grids[:heads, 0].float().cpu().numpy(), _int64(grids[:heads, 1])
    if heads == 1:
        return UniformOperand(quantizer.bits, scales[0], int(zero_points[0]))
    return PerHeadOperand(quantizer.bits, scales, zero_points)


def with_equal_heads(left: Activation, right: Activation) -> tuple[Activation, Activation]:
    """Both operands; those per head repeated to the least common multiple of their heads."""
    operands = (left, right)
    heads = math.lcm(*(operand.heads for operand in operands if isinstance(operand, PerHeadOperand)))
    left, right = (_repeated(o, heads // o.heads) if isinstance(o, PerHeadOperand) else o for o in operands)
    return left, right


def _repeated(operand: PerHeadOperand, times: int) -> PerHeadOperand:
    return PerHeadOperand(operand.bits, np.tile(operand.scales, times), np.tile(operand.zero_points, times))


def patches_of(layer: nn.Module) -> Patches | None:
    """How a Conv2d cuts its input, None of a Linear."""
    if isinstance(layer, nn.Linear):
        return None
    kernel, stride, padding = (tuple(size) for size in (layer.kernel_size, layer.stride, layer.padding))
    return Patches(layer.in_channels, kernel, stride, padding, layer.groups)


@torch.no_grad()
def weight_operand(layer: nn.Module) -> WeightOperand:
    """The weight (N, K) of a frozen quantized Linear or Conv2d; K of a convolution is channels, then kernel rows.

    Raises:
        SpecError: the weight is not float32, not on its grid, or its quantizer is not frozen.
    """
    quantizer, weight = layer.weight_fake_quant, layer.weight
    check_frozen(quantizer)
    if weight.dtype != torch.float32:
        raise SpecError(f"the weight must be float32, got {weight.dtype}; export the model before you cast it")
    codes = quantizer.encode(weight)
    off = int((quantizer.decode(codes) != weight).sum())
    if off:
        raise SpecError(f"{off} of {weight.numel()} weights are off their grid; freeze the model first")
    ones = torch.ones(len(weight), device=weight.device)
    scales, zero_points = quantizer.scale * ones, quantizer.zero_point * ones
    return WeightOperand(
        quantizer.bits, _int64(codes.flatten(1)), scales.float().cpu().numpy(), _int64(zero_points.round())
    )


def check_frozen(quantizer: FakeQuantize) -> None:
    """SpecError unless the quantizer is on, in its final form, and neither observes nor drops nor rounds softly."""
    wrong = unfrozen(quantizer)
    if wrong:
        raise SpecError(f"the model is not frozen ({', '.join(wrong)}); export what `quantize` or `freeze` returned")


def _uniform(quantizer: UniformFakeQuantize) -> UniformOperand:
    if quantizer.scale.numel() != 1:
        raise SpecError(f"a uniform operand has one scale, got {quantizer.scale.numel()}; use the family cag")
    return UniformOperand(quantizer.bits, _float32(quantizer.scale), int(quantizer.zero_point))


def _grouped(quantizer: CAGFakeQuantize) -> GroupedOperand:
    starts = _int64(quantizer.boundaries())
    return GroupedOperand(
        quantizer.bits,
        _int64(quantizer.permutation()),
        np.append(starts, len(quantizer.labels)),
        quantizer.scale.detach().float().cpu().numpy(),
        _int64(quantizer.zero_point),
    )


def _hluq(quantizer: HLUQFakeQuantize) -> HLUQOperand:
    params = quantizer.params()
    return HLUQOperand(
        quantizer.bits,
        _float32(params.offset),
        _float32(params.scale_log),
        _float32(params.scale_uniform),
        int(params.log_levels),
        _boundaries(quantizer.table()),
    )


def _lnq(quantizer: LNQFakeQuantize) -> TableOperand:
    params = quantizer.params()
    integers = _int64(lnq.integer_levels(params, quantizer.bits))
    return _table(quantizer.bits, quantizer.table(), integers, lnq.DECODE_FRACTION_BITS, params.clip)


def _agq(quantizer: AGQFakeQuantize) -> TableOperand:
    params = quantizer.params()
    return _powers(quantizer.bits, quantizer.table(), int(params.tau), params.scale)


def _power_of_two(quantizer: PowerOfTwoFakeQuantize) -> TableOperand:
    params = quantizer.params()
    return _powers(quantizer.bits, quantizer.table(), 1, params.scale, params.offset)


def _powers(bits: int, table: Table, parts: int, scale: Tensor, offset: Tensor | None = None) -> TableOperand:
    """Levels ``2^(-code / parts)`` and 0 of the last code: exact in as few fraction bits as possible, 30 at most.

    Roots of two, and powers below 2^-30, are rounded (half to even) to 2^-30 of the scale.
    """
    codes = np.arange(2**bits - 1)
    exact = int(codes[-1]) if parts == 1 else MAX_TABLE_ENTRY.bit_length()
    fraction = min(exact, MAX_TABLE_ENTRY.bit_length() - 1)
    integers = np.append(np.rint(np.exp2(fraction - codes / parts)), 0).astype(np.int64)
    return _table(bits, table, integers, fraction, scale, offset)


def _table(
    bits: int, table: Table, integers: np.ndarray, fraction: int, scale: Tensor, offset: Tensor | None = None
) -> TableOperand:
    unit = np.float32(np.ldexp(_float32(scale), -fraction))
    shift = np.float32(0) if offset is None else _float32(offset)
    return TableOperand(bits, _boundaries(table), _int64(table.codes), integers, unit, shift)


_CONVERTERS: dict[type[FakeQuantize], Callable[[Any], Activation]] = {
    UniformFakeQuantize: _uniform,
    CAGFakeQuantize: _grouped,
    HLUQFakeQuantize: _hluq,
    LNQFakeQuantize: _lnq,
    AGQFakeQuantize: _agq,
    PowerOfTwoFakeQuantize: _power_of_two,
}
_FAMILIES = tuple(kind.family for kind in _CONVERTERS)


def _boundaries(table: Table) -> np.ndarray:
    return table.boundaries.detach().cpu().numpy()


def _float32(value: Tensor) -> np.float32:
    return np.float32(value.detach().float().item())


def _int64(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().astype(np.int64)
