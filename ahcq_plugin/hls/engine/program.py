# SPDX-License-Identifier: Apache-2.0
"""A whole model on the engine: one memory, a command for every matmul, and the steps of the host between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export import Matmul, Spec, SpecError, golden
from ahcq_plugin.export.interpret import Call, interpreted, node_output, right_codes, row_codes
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import Command, compile_matmul
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.support.batches import Forward, default_forward, model_device, to_device


@dataclass(frozen=True)
class ProgramStep:
    """One step of a unit.

    Attributes:
        name: of the step in the spec.
        op: ``engine`` for a command, else the float operation that the host executes.
        inputs: names of the steps that it reads.
    """

    name: str
    op: str
    inputs: tuple[str, ...]


@dataclass
class Program:
    """Commands and memory for units of a spec.

    A command is compiled when its rows and products are first met, since prompts change them; each has its weights.

    Attributes:
        spec: of the model.
        config: of the engine.
        image: the memory.
        run: executes descriptors in ``image``: ``simulate.run`` (the C++), or ``rtl.run``.
        commands: (unit, matmul, rows, products) -> command.
    """

    spec: Spec
    config: EngineConfig = PAPER
    image: Image = field(default_factory=Image)
    run: Callable[[Image, Sequence[Descriptor], EngineConfig], Any] = simulate.run
    commands: dict[tuple[str, str, int, int], Command] = field(default_factory=dict)

    def steps(self, unit: str) -> list[ProgramStep]:
        """What host and engine do for ``unit``, in the order of execution."""
        steps = self.spec[unit].steps
        return [ProgramStep(step.name, "engine" if step.matmul else step.op, step.inputs) for step in steps]

    def command(self, unit: str, matmul: Matmul, rows: int, batch: int) -> Command:
        """The command of a matmul; SpecError if it does not fit the engine."""
        key = (unit, matmul.name, rows, batch)
        if key not in self.commands:
            try:
                self.commands[key] = compile_matmul(matmul, self.image, self.config, rows, batch)
            except SpecError as error:
                raise SpecError(f"unit '{unit}': {error}") from None
        return self.commands[key]

    def execute(self, unit: str, matmul: Matmul, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
        """float32 (..., m, n), what ``golden.run`` gives for these codes, by the engine."""
        leading = left.shape[:-2]
        left = left.reshape(-1, *left.shape[-2:])
        command = self.command(unit, matmul, left.shape[-2], len(left))
        command.write_left(self.image, left)
        if right is not None:
            command.write_right(self.image, right.reshape(-1, *right.shape[-2:]))
        self.run(self.image, [command.descriptor], self.config)
        return command.read_output(self.image).reshape(*leading, *left.shape[1:-1], matmul.n)


@dataclass
class Checked:
    """How one matmul compared with the golden model.

    Attributes:
        calls, outputs: how many calls, and float32 numbers.
        different: how many of these differ in any bit.
    """

    calls: int = 0
    outputs: int = 0
    different: int = 0


@torch.no_grad()
def engine_forward(
    qmodel: nn.Module,
    program: Program,
    batch: Any,
    forward: Forward | None = None,
    units: Sequence[str] | None = None,
    check: bool = True,
) -> tuple[Any, dict[tuple[str, str], Checked]]:
    """Run a frozen model with its matmuls on the engine, each on the results of those before; the host does the rest.

    Args:
        units: names of the units that run there; None: all of the spec.
        check: compare every matmul with the golden model on the same codes.
    Returns:
        (what the model gives, (unit, matmul) -> comparison).
    """
    wanted = [unit.name for unit in program.spec.units] if units is None else list(units)
    matmuls = {(name, matmul.name): matmul for name in wanted for matmul in program.spec[name].matmuls}
    rows: dict[tuple[str, str], Checked] = {}

    def on_matmul(unit: str, call: Call) -> Tensor:
        key = (unit, call.site.node.name)
        if key not in matmuls:
            return call.float_output()
        matmul = matmuls[key]
        left, right = row_codes(matmul, call.left), right_codes(matmul, call)
        output = program.execute(unit, matmul, left, right)
        row = rows.setdefault(key, Checked())
        row.calls += 1
        row.outputs += output.size
        if check:
            golden_output = golden.run(matmul, left, right).output
            row.different += int((output.view(np.uint32) != golden_output.view(np.uint32)).sum())
        return node_output(matmul, call, output)

    run: Callable[[nn.Module, Any], Any] = forward or default_forward
    with interpreted({name: prepared_units(qmodel)[name] for name in wanted}, on_matmul):
        return run(qmodel, to_device(batch, model_device(qmodel))), rows
