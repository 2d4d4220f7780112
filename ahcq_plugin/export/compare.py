# SPDX-License-Identifier: Apache-2.0
"""The golden model beside the fake-quantized PyTorch model: matmul by matmul, and whole units chained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.codes import decode
from ahcq_plugin.export.interpret import Call, cut_patches, golden_output, interpreted, running
from ahcq_plugin.export.interpret_softmax import Computed, SoftmaxRow, TableSoftmaxInterpreter
from ahcq_plugin.export.matmul import Matmul, lane_names
from ahcq_plugin.export.operands import SpecError, TableOperand
from ahcq_plugin.export.sites import OperandSource
from ahcq_plugin.export.spec import Spec
from ahcq_plugin.functional import uniform
from ahcq_plugin.functional.uniform import UniformParams
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device

#: Rounding of float32: half the distance from 1 to the next number.
UNIT_ROUNDOFF = 2.0**-24
#: How the golden model computes softmax: in floating point, as the audited model does, or on integers.
SOFTMAXES = ("float", "tables")


@dataclass
class MatmulRow:
    """Errors of one matmul over all data, in units of ``u * sum_k |x_k| |w_k|`` of each output, u = 2^-24.

    They are measured against float64 on the levels of PyTorch's quantizers. In the sum, x counts with twice the offset
    of its quantizer; the bias is in it. Where levels of an integer table are rounded (roots of two), the golden model's
    error is what exceeds half a unit of the table for each x.

    Attributes:
        outputs: number of output values.
        golden_error, torch_error: largest error.
        golden_limit, torch_limit: proven bounds of them (``rounding_limits``).
        codes, differing: codes that enter the matmul, and how many of them differ when the unit runs chained.
    """

    unit: str
    matmul: Matmul
    outputs: int = 0
    golden_error: float = 0.0
    torch_error: float = 0.0
    codes: int = 0
    differing: int = 0
    golden_limit: float = field(init=False)
    torch_limit: float = field(init=False)

    def __post_init__(self) -> None:
        self.golden_limit, self.torch_limit = rounding_limits(self.matmul)


@dataclass
class UnitRow:
    """A unit whose matmuls all run in integers, one after the other, on the same input as PyTorch.

    Attributes:
        codes, differing: codes that enter its matmuls, and how many of them differ from PyTorch's.
        error: largest relative difference of its outputs, ``|golden - torch| / |torch|`` (Euclidean norms).
    """

    unit: str
    codes: int = 0
    differing: int = 0
    error: float = 0.0

    @property
    def share(self) -> float:
        """Share of differing codes."""
        return self.differing / max(self.codes, 1)


def rounding_limits(matmul: Matmul) -> tuple[float, float]:
    """Bounds of ``golden_error`` and ``torch_error``.

    Golden: a lane takes two roundings and an addition; the constant offset, both scales, the bias and the levels of
    PyTorch's quantizer, rounded once, some more. PyTorch: k products and sums in any order, bias, scalar factors.
    Each limit has room for the second order.
    """
    return 3 * len(lane_names(matmul.left)) + 8.0, matmul.k + 8.0


@torch.no_grad()
def compare(
    qmodel: nn.Module, spec: Spec, batches: Iterable[Any], forward: Forward | None = None
) -> tuple[list[MatmulRow], list[UnitRow]]:
    """Run PyTorch's model on ``batches`` and the golden model beside it.

    Every matmul is fed with the codes that PyTorch has there; every unit is then run chained, from the input that it
    has in PyTorch.
    """
    units = {name: unit for name, unit in prepared_units(qmodel).items() if any(u.name == name for u in spec.units)}
    rows = {(unit.name, matmul.name): MatmulRow(unit.name, matmul) for unit, matmul in spec.matmuls()}
    chains = {name: UnitRow(name) for name in units}
    seen: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    chained = False

    def on_matmul(unit: str, call: Call) -> Tensor:
        row = rows.get((unit, call.site.node.name))
        if row is None:
            return call.float_output()
        key, codes = (unit, row.matmul.name), (call.left, call.right)
        if chained:
            _count(row, seen.pop(key), codes)
            return golden_output(row.matmul, call)[1]
        seen[key] = codes
        out = call.float_output()
        _measure(row, call, out, units[unit])
        return out

    forward, device = forward or default_forward, model_device(qmodel)
    with interpreted(units, on_matmul) as interpreters:
        for name, unit in units.items():
            run = interpreters[name].run

            def both(*args: Any, run=run, name=name, **kwargs: Any) -> Any:
                nonlocal chained
                out = run(*args, **kwargs)
                chained = True
                other = run(*args, **kwargs)
                chained = False
                chains[name].error = max(chains[name].error, _difference(other, out))
                return out

            unit.forward = both
        for batch in batches:
            forward(qmodel, to_device(batch, device))
    for row in rows.values():
        chains[row.unit].codes += row.codes
        chains[row.unit].differing += row.differing
    return list(rows.values()), list(chains.values())


def check_of_model(qmodel: nn.Module, spec: Spec) -> None:
    """Raise SpecError unless the spec has the units of the model, but for those that it says are left out, and no
    others, and each matmul of theirs is in the unit's graph."""
    units = prepared_units(qmodel)
    exported = {unit.name for unit in spec.units}
    left_out = {name for name in units if any(line.startswith(f"{name}: ") for line in spec.left_out)}
    if wrong := sorted((units.keys() ^ exported) - left_out):
        raise SpecError(f"the spec is of another model: {wrong[0]!r} is a unit of one of them alone; export it again")
    nodes = {name: {node.name for node in unit.graph.nodes} for name, unit in units.items()}
    for unit, matmul in spec.matmuls():
        if matmul.name not in nodes[unit.name]:
            raise SpecError(f"the spec is of another model: unit {unit.name!r} has no matmul {matmul.name!r}")


def _computing(spec: Spec) -> Callable[[str, Call], Computed]:
    """From a unit's name and the call of a matmul to its output: in integers where ``spec`` has it."""
    matmuls = {(unit.name, matmul.name): matmul for unit, matmul in spec.matmuls()}

    def on_matmul(unit: str, call: Call) -> Computed:
        matmul = matmuls.get((unit, call.site.node.name))
        if matmul is None:
            return call.float_output(), None
        result, output = golden_output(matmul, call)
        return output, (matmul, result.accumulators)

    return on_matmul


@torch.no_grad()
def golden_forward(
    qmodel: nn.Module, spec: Spec, batch: Any, forward: Forward | None = None, softmax: str = "float"
) -> Any:
    """What the model gives when every exported matmul runs in integers, all units chained.

    Args:
        softmax: ``float``, or ``tables`` (``table_softmax_forward``).
    Raises:
        ValueError: another softmax.
    """
    if softmax not in SOFTMAXES:
        raise ValueError(f"`softmax` must be one of {', '.join(SOFTMAXES)}, got {softmax!r}")
    if softmax == "tables":
        return table_softmax_forward(qmodel, spec, batch, forward)[0]
    compute = _computing(spec)
    with interpreted(prepared_units(qmodel), lambda unit, call: compute(unit, call)[0]):
        return (forward or default_forward)(qmodel, to_device(batch, model_device(qmodel)))


@torch.no_grad()
def table_softmax_forward(
    qmodel: nn.Module, spec: Spec, batch: Any, forward: Forward | None = None
) -> tuple[Any, dict[tuple[str, str], SoftmaxRow]]:
    """``golden_forward`` with softmax and its quantizer on integers as well (``table_softmax``).

    Returns:
        (what the model gives, (unit, quantizer) -> how the codes compared with those of a float softmax).
    """
    compute = _computing(spec)
    units = prepared_units(qmodel).items()
    interpreters = {name: TableSoftmaxInterpreter(unit, partial(compute, name)) for name, unit in units}
    with running(interpreters.values()):
        out = (forward or default_forward)(qmodel, to_device(batch, model_device(qmodel)))
    return out, {(name, row): interpreters[name].rows[row] for name in interpreters for row in interpreters[name].rows}


def mask_overlap(wanted: Tensor, found: Tensor) -> tuple[Tensor, int]:
    """Of two sets of mask logits (N, 1, h, w): IoU of each pair (N,), 1 where both are empty, and flipped pixels."""
    a, b = ((logits > 0).flatten(1, 2) for logits in (wanted, found))
    return mask_iou(a, b), int((a != b).sum())


def _count(row: MatmulRow, before: tuple[Tensor | None, ...], now: tuple[Tensor | None, ...]) -> None:
    for old, new in zip(before, now, strict=True):
        if old is not None:
            row.codes += old.numel()
            row.differing += int((old != new).sum())


def _measure(row: MatmulRow, call: Call, out: Tensor, unit: nn.Module) -> None:
    matmul = row.matmul
    left = _values(unit, call.site.left, call.left, call.left_params).cpu().numpy()
    levels = decode(matmul.left, call.left.cpu().numpy())
    size = np.abs(levels).astype(np.float64) + 2 * abs(float(getattr(matmul.left, "offset", 0)))
    rounded = np.zeros_like(size)
    if isinstance(matmul.left, TableOperand):
        rounded = np.minimum(np.abs(levels - left), matmul.left.unit / 2)
    bias = np.zeros(1)
    if call.right is None:
        layer = call.site.layer
        right = _whole_weight(layer.weight.detach().flatten(1).double().cpu().numpy(), matmul.groups).T
        bias = bias if layer.bias is None else layer.bias.detach().double().cpu().numpy()
    else:
        right = _values(unit, call.site.right, call.right, call.right_params).double().cpu().numpy()
    if matmul.patches is not None:
        left, size, rounded = (cut_patches(x, matmul.patches, 0) for x in (left, size, rounded))
    exact, limit = left.astype(np.float64) @ right + bias, size @ np.abs(right) + np.abs(bias)
    factor = float(call.rescale(torch.ones((), dtype=torch.float64)))
    result, other = golden_output(matmul, call)
    row.outputs += result.output.size
    for name, values, granted in (("golden_error", other, rounded @ np.abs(right)), ("torch_error", out, 0)):
        values = values.permute(0, 2, 3, 1) if matmul.patches is not None else values
        error = np.abs(values.cpu().double().numpy().reshape(exact.shape) - exact * factor) - granted * abs(factor)
        bound = np.maximum(limit * abs(factor) * UNIT_ROUNDOFF, np.finfo(np.float32).tiny)
        setattr(row, name, max(getattr(row, name), float((error / bound).max(initial=0))))


def _whole_weight(weight: np.ndarray, groups: int) -> np.ndarray:
    """(n, groups * k): the weight (n, k) of a convolution with groups, zeros where an output reads nothing."""
    n, k = weight.shape
    whole = np.zeros((groups, n // groups, groups, k))
    whole[range(groups), :, range(groups)] = weight.reshape(groups, n // groups, k)
    return whole.reshape(n, groups * k)


def _values(unit: nn.Module, operand: OperandSource, codes: Tensor, params: UniformParams | None) -> Tensor:
    quantizer = unit.get_submodule(operand.quantizer.target)
    return quantizer.decode(codes) if params is None else uniform.decode(codes, params, quantizer.bits)


def _difference(a: Any, b: Any) -> float:
    """Largest relative difference between tensors, or tuples of tensors, of the same structure."""
    if isinstance(a, Tensor):
        return float((a - b).norm() / b.norm().clamp(min=1e-30))
    return max(_difference(x, y) for x, y in zip(a, b, strict=True))
