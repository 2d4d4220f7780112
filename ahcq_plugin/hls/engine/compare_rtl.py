# SPDX-License-Identifier: Apache-2.0
"""Matmuls of a model on the codes of an image, through the C++ simulation and through the RTL of one engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ahcq_plugin.export import Spec
from ahcq_plugin.hls.engine import rtl, simulate
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.cycles import DDR, cycles
from ahcq_plugin.hls.engine.descriptor import Descriptor
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.engine.program import Program, engine_forward
from ahcq_plugin.hls.engine.shape import Shape
from ahcq_plugin.support.batches import Forward

_UNLIMITED = DDR(1e12)  # a beat a cycle at every port, as rtl.Memory() has it


def compare_rtl(
    qmodel: nn.Module,
    spec: Spec,
    batch: Any,
    forward: Forward,
    units: Sequence[str],
    config: EngineConfig = rtl.SMALLEST,
) -> list[dict[str, Any]]:
    """A row for each matmul of ``units``: floats, how many of them differ from the golden model, cycles.

    Raises:
        SpecError: a matmul does not fit ``config``. RtlError, ToolError: see ``rtl.run``.
    """
    taken: list[int] = []

    def run(image: Image, descriptors: Sequence[Descriptor], config: EngineConfig) -> None:
        taken.append(rtl.run(image, descriptors, config).cycles)

    by_cpp, by_rtl = Program(spec, config, run=simulate.run), Program(spec, config, run=run)
    _, cpp = engine_forward(qmodel, by_cpp, batch, forward, units)
    _, run_rows = engine_forward(qmodel, by_rtl, batch, forward, units)
    commands = {key[:2]: command for key, command in by_cpp.commands.items()}
    cycles_of = dict(zip(run_rows, taken, strict=True))  # each was called once
    rows = []
    for (unit, name), row in cpp.items():
        command = commands[unit, name]
        shape = Shape.of(command.matmul, command.descriptor.m, command.descriptor.batch)
        rows.append(
            dict(
                unit=unit,
                name=name,
                kind=shape.kind,
                family=shape.family,
                outputs=row.outputs,
                different_cpp=row.different,
                different_rtl=run_rows[unit, name].different,
                cycles=cycles_of[unit, name],
                model=cycles(shape, config, ddr=_UNLIMITED).cycles,
            )
        )
    return rows
