# SPDX-License-Identifier: Apache-2.0
"""The layer spec: units, their matmuls and the glue between them. ``spec_io`` reads and writes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ahcq_plugin.export.matmul import Matmul
from ahcq_plugin.export.operands import SpecError


@dataclass(frozen=True)
class Step:
    """One node of a unit's graph, in the order of execution.

    Attributes:
        name: of the node.
        op: ``input``, ``quantize``, ``matmul``, ``output``, or the float operation: ``layer_norm``, ``softmax``, ...
        inputs: names of the steps that it reads.
        matmul: name of the matmul that it is; "" for other steps.
        quantizers: of a matmul the names of the steps that quantize its left and (qk, av) its right operand.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    matmul: str = ""
    quantizers: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitSpec:
    """One unit.

    Attributes:
        name: of the module in the model.
        matmuls: in the order of execution.
        steps: the whole unit in the order of execution, the float glue included.
    """

    name: str
    matmuls: tuple[Matmul, ...]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        names = [matmul.name for matmul in self.matmuls]
        if len(set(names)) != len(names):
            raise SpecError(f"unit '{self.name}': the names of matmuls must differ, got {', '.join(names)}")
        known: set[str] = set()
        for step in self.steps:
            problem = f"unit '{self.name}', step '{step.name}'"
            if step.name in known:
                raise SpecError(f"{problem}: the name is taken by an earlier step")
            missing = [name for name in (*step.inputs, *step.quantizers) if name not in known]
            if missing:
                raise SpecError(f"{problem} reads {', '.join(missing)}, which no earlier step gives")
            if (step.op == "matmul") != bool(step.matmul) or (step.matmul and step.matmul not in names):
                raise SpecError(f"{problem} ({step.op}) names the matmul {step.matmul!r}; the unit has {names}")
            known.add(step.name)

    def __getitem__(self, name: str) -> Matmul:
        """The matmul called ``name``; SpecError if there is none."""
        for matmul in self.matmuls:
            if matmul.name == name:
                return matmul
        raise SpecError(f"unit '{self.name}' has no matmul {name!r}; it has {', '.join(m.name for m in self.matmuls)}")


@dataclass(frozen=True)
class Spec:
    """All units of a model.

    Attributes:
        units: in the order of execution.
        left_out: ``unit.node: reason`` for every quantized layer or matmul that is not exported.
    """

    units: tuple[UnitSpec, ...]
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        if len(set(names)) != len(names):
            raise SpecError(f"the names of units must differ, got {', '.join(names)}")

    def __getitem__(self, name: str) -> UnitSpec:
        """The unit called ``name``; SpecError if there is none."""
        for unit in self.units:
            if unit.name == name:
                return unit
        raise SpecError(f"the spec has no unit {name!r}; it has {', '.join(u.name for u in self.units)}")

    def matmuls(self) -> Iterator[tuple[UnitSpec, Matmul]]:
        """Every matmul with its unit, in the order of execution."""
        return ((unit, matmul) for unit in self.units for matmul in unit.matmuls)
