# SPDX-License-Identifier: Apache-2.0
"""A whole model on the engine: one memory, a command for every matmul, and the steps of the host between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ahcq_plugin.export import Matmul, Spec, SpecError, golden
from ahcq_plugin.export.compare import SOFTMAXES
from ahcq_plugin.export.interpret import Call, interpreted, node_output, right_codes, row_codes, running
from ahcq_plugin.export.interpret_softmax import Computed, SoftmaxCall, TableSoftmaxInterpreter, run_softmax
from ahcq_plugin.export.matmul import heads_of
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import Command, compile_matmul
from ahcq_plugin.hls.engine.config import PAPER, EngineConfig
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.destination import shorts
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.softmax_command import SoftmaxCommand, compile_softmax, find_positions
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
        softmax: ``float``: the host's; ``tables``: on integers, as a command from the accumulators of Q.K^T to the left
            codes of A.V where that fits the engine, else by the golden step on the host.
        commands: (unit, matmul, rows, products) -> command.
        softmaxes: (unit, quantizer, rows, products) -> command.
    """

    spec: Spec
    config: EngineConfig = PAPER
    image: Image = field(default_factory=Image)
    run: Callable[[Image, Sequence[Descriptor], EngineConfig], Any] = simulate.run
    softmax: str = "float"
    commands: dict[tuple[str, str, int, int], Command] = field(default_factory=dict)
    softmaxes: dict[tuple[str, str, int, int], SoftmaxCommand] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAXES:
            raise ValueError(f"`softmax` must be one of {', '.join(SOFTMAXES)}, got {self.softmax!r}")
        if self.softmax == "tables" and not self.config.softmax:
            raise SpecError("softmax='tables' needs an engine with a unit for it: EngineConfig(softmax=True)")

    def steps(self, unit: str) -> list[ProgramStep]:
        """What host and engine do for ``unit``, in the order of execution; softmaxes as far as they have been met."""
        steps = self.spec[unit].steps
        on_engine = {step.name for step in steps if step.matmul}
        for step in steps:
            if any(key[:2] == (unit, step.name) for key in self.softmaxes):
                on_engine |= {step.name, *step.inputs}  # the quantizer, and the softmax before it
        return [ProgramStep(step.name, "engine" if step.name in on_engine else step.op, step.inputs) for step in steps]

    def command(self, unit: str, matmul: Matmul, rows: int, batch: int, codes: int | None = None) -> Command:
        """The command of a matmul; SpecError if it does not fit the engine.

        Args:
            codes: address of left codes that a softmax writes.
        """
        key = (unit, matmul.name, rows, batch)
        if key not in self.commands:
            fits = self.softmax == "tables" and matmul.kind == "qk" and matmul.accumulator_bits <= 16
            to = shorts(batch, rows, matmul.n, heads_of(matmul.left, matmul.right)) if fits else None
            try:
                self.commands[key] = compile_matmul(matmul, self.image, self.config, rows, batch, to, codes)
            except SpecError as error:
                raise SpecError(f"unit '{unit}': {error}") from None
        return self.commands[key]

    def execute(
        self, unit: str, matmul: Matmul, left: np.ndarray, right: np.ndarray | None = None, quantizer: str = ""
    ) -> np.ndarray:
        """float32 (..., m, n), what ``golden.run`` gives for these codes, by the engine.

        Args:
            quantizer: name of the one that made the left codes: where they are those that its softmax wrote, they stay
                where they are.
        """
        leading = left.shape[:-2]
        left = left.reshape(-1, *left.shape[-2:])
        before = self.softmaxes.get((unit, quantizer, left.shape[-2], len(left)))
        codes = before.descriptor.out if before and np.array_equal(before.read_codes(self.image), left) else None
        command = self.command(unit, matmul, left.shape[-2], len(left), codes)
        if command.descriptor.left != codes:
            command.write_left(self.image, left)
        if right is not None:
            command.write_right(self.image, right.reshape(-1, *right.shape[-2:]))
        self.run(self.image, [command.descriptor], self.config)
        return command.read_output(self.image).reshape(*leading, *left.shape[1:-1], matmul.n)

    def execute_softmax(self, unit: str, call: SoftmaxCall) -> np.ndarray:
        """int64 codes (..., m, n), what the golden step gives, by the engine.

        Raises:
            SpecError: it has to stay on the host; says why.
        """
        if not call.product:
            raise SpecError("terms are added to its scores")
        m, n = call.scores.shape[-2:]
        batch, heads = call.scores.size // (m * n), len(call.step.mantissas)
        key = (unit, call.quantizer, m, batch)
        known = self.softmaxes[key].positions if key in self.softmaxes else None
        positions, *terms = find_positions(call.terms, call.bits, known) if call.terms else (None,)
        product = self.commands.get((unit, call.product, m, batch))
        if product is not None and not product.destination.shorts:
            raise SpecError(f"its scores have {product.matmul.accumulator_bits} bits, the engine writes 16")
        of_rows = np.zeros(batch * m, np.int64) if call.heads is None else call.heads.ravel()
        in_order = np.array_equal(of_rows, np.repeat(np.arange(batch) % heads, m))
        wanted = call.scores.ravel() - sum(term.ravel() for term in call.terms)
        if product is None or not in_order or (product.read_sums(self.image).ravel() << call.bits != wanted).any():
            raise SpecError("its scores are moved behind their product")
        if key not in self.softmaxes:
            scores = product.descriptor.out
            self.softmaxes[key] = compile_softmax(
                call.quantizer, call.step, self.image, self.config, (batch, m, n), scores, positions=positions
            )
        if positions is not None:
            self.softmaxes[key].write_terms(self.image, *(term.reshape(batch, m, -1) for term in terms))
        self.run(self.image, [self.softmaxes[key].descriptor], self.config)
        return self.softmaxes[key].read_codes(self.image).reshape(call.scores.shape)


@dataclass
class Checked:
    """How one matmul, or softmax on tables, compared with the golden model.

    Attributes:
        calls, outputs: how many calls, and float32 numbers, or codes.
        different: how many of these differ in any bit.
        reason: why a softmax was the host's in its last call, else "".
    """

    calls: int = 0
    outputs: int = 0
    different: int = 0
    reason: str = ""


@torch.no_grad()
def engine_forward(
    qmodel: nn.Module,
    program: Program,
    batch: Any,
    forward: Forward | None = None,
    units: Sequence[str] | None = None,
    check: bool = True,
) -> tuple[Any, dict[tuple[str, str], Checked]]:
    """Run a frozen model with its matmuls, and softmaxes on tables, on the engine, each on the results of those before;
    the host does the rest.

    Args:
        units: names of the units that run there; None: all of the spec.
        check: compare every matmul with the golden model on the same codes, every softmax on the same scores.
    Returns:
        (what the model gives, (unit, matmul, or quantizer behind a softmax on tables) -> comparison).
    """
    wanted = [unit.name for unit in program.spec.units] if units is None else list(units)
    matmuls = {(name, matmul.name): matmul for name in wanted for matmul in program.spec[name].matmuls}
    rows: dict[tuple[str, str], Checked] = {}

    def on_matmul(unit: str, call: Call) -> Computed:
        key = (unit, call.site.node.name)
        if key not in matmuls:
            return call.float_output(), None
        matmul = matmuls[key]
        left, right = row_codes(matmul, call.left), right_codes(matmul, call)
        output = program.execute(unit, matmul, left, right, call.site.left.quantizer.name)
        row = rows.setdefault(key, Checked())
        row.calls += 1
        row.outputs += output.size
        scored = program.softmax == "tables" and matmul.kind == "qk"  # their integers may be scores of the host
        found = golden.run(matmul, left, right) if check or scored else None
        if check and found is not None:
            row.different += int((output.view(np.uint32) != found.output.view(np.uint32)).sum())
        return node_output(matmul, call, output), None if found is None else (matmul, found.accumulators)

    def on_softmax(unit: str, call: SoftmaxCall) -> np.ndarray:
        row = rows.setdefault((unit, call.quantizer), Checked())
        row.calls += 1
        try:
            codes, row.reason = program.execute_softmax(unit, call), ""
        except SpecError as error:
            row.reason = str(error)
            return run_softmax(call)
        row.outputs += codes.size
        if check:
            row.different += int((codes != run_softmax(call)).sum())
        return codes

    run: Callable[[nn.Module, Any], Any] = forward or default_forward
    chosen = {name: prepared_units(qmodel)[name] for name in wanted}
    batch = to_device(batch, model_device(qmodel))
    if program.softmax == "float":
        with interpreted(chosen, lambda unit, call: on_matmul(unit, call)[0]):
            return run(qmodel, batch), rows
    interpreters = {
        name: TableSoftmaxInterpreter(unit, partial(on_matmul, name), partial(on_softmax, name))
        for name, unit in chosen.items()
    }
    with running(interpreters.values()):
        out = run(qmodel, batch)
    for name, interpreter in interpreters.items():
        for quantizer, kept in interpreter.rows.items():
            if kept.reason:
                rows[name, quantizer] = Checked(reason=kept.reason)
    return out, rows
