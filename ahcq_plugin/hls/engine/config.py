# SPDX-License-Identifier: Apache-2.0
"""How large an engine is: the C++ struct ``ahcq::engine::cells`` as Python knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ahcq_plugin.export.operands import SpecError, check_int

LANES = 8
PES = 64
CHUNKS = PES // LANES
MAX_GROUPS = 64
MAX_HEADS = 64
THRESHOLDS = 1024  # of all quantizers of a command
MAX_CHUNKS = 1024  # of 8 output columns each, in a command that writes codes
NIBBLE = 4
GELUS = 2  # units of a cell
SUM_BITS = 40  # of sums over all passes
ROWS = 8  # of floats, in work in a cell at once


@dataclass(frozen=True)
class EngineConfig:
    """Settings of ``ahcq::engine::cells``.

    Attributes:
        cells: of 64 processing elements with 8 inputs each; each works on a row of its own.
        digit: bits of a left operand that a cell takes a cycle: 4, or 17, with which decode tables of 17 bits take one.
        left_depth: beats (32 bytes) of each half of a cell's left buffer.
        right_depth: folds (8 codes) of 64 columns of each half of the right buffer.
        plane: bits of a right code that a cell takes a cycle: 4, or 8, with which all codes take one. That is the
            engine of INT8 which the one of INT4 is compared with.
        softmax: whether there is a unit for softmax beside the cells, with ports of its own (docs/softmax.md).
        shift_lanes: whether log codes of HLUQ are shifted while its uniform codes are multiplied; else they take passes
            of their own, as a second group. With ``plane`` 8 they always do.
    """

    cells: int = 2
    digit: int = NIBBLE
    left_depth: int = 1024
    right_depth: int = 1024
    plane: int = NIBBLE
    softmax: bool = False
    shift_lanes: bool = True

    def __post_init__(self) -> None:
        check_int("cells", self.cells, 1, 16)
        check_int("digit", self.digit, NIBBLE, 17)
        check_int("left_depth", self.left_depth, 1, 2**14)
        check_int("right_depth", self.right_depth, 1, 2**14 if self.plane == NIBBLE else 2**12)
        if self.plane not in (NIBBLE, 8):
            raise SpecError(f"`plane` must be 4 or 8, got {self.plane!r}")
        for name in ("softmax", "shift_lanes"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"`{name}` must be True or False, got {getattr(self, name)!r}")

    @property
    def cpp(self) -> str:
        """The C++ type."""
        more = ", 1" if self.softmax else ""
        if self.plane == NIBBLE and not self.shift_lanes:
            more = f", {int(self.softmax)}, false"
        sizes = f"{self.cells}, {self.digit}, {self.left_depth}, {self.right_depth}, {self.plane}{more}"
        return f"ahcq::engine::cells<{sizes}>"

    @property
    def shifts(self) -> bool:
        """Whether there are shift lanes."""
        return self.shift_lanes and self.plane == NIBBLE

    @property
    def lanes(self) -> int:
        """Multiplications of a cycle: processing elements times inputs."""
        return self.cells * PES * LANES

    @property
    def accumulator_bits(self) -> int:
        """Of a cell's accumulators, signed."""
        return 32 if self.digit <= 8 else 64


@dataclass(frozen=True)
class FloatConfig:
    """Settings of ``ahcq::engine::float_cells``, the engine of float32 that those of codes are compared with.

    Attributes:
        cells: as of ``EngineConfig``; a cell has ``ROWS`` rows in work.
        left_depth: beats (8 floats) of each half of a cell's left buffer.
        right_depth: folds (8 floats) of 64 columns of each half of the right buffer.
    """

    cells: int = 2
    left_depth: int = 1024
    right_depth: int = 128
    softmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_int("cells", self.cells, 1, 16)
        check_int("left_depth", self.left_depth, ROWS, 2**14)
        check_int("right_depth", self.right_depth, 1, 2**12)

    @property
    def cpp(self) -> str:
        """The C++ type."""
        return f"ahcq::engine::float_cells<{self.cells}, {self.left_depth}, {self.right_depth}>"


AnyConfig = EngineConfig | FloatConfig
PAPER = EngineConfig()
WIDE = EngineConfig(digit=17)
INT8 = EngineConfig(digit=8, plane=8)
FP32 = FloatConfig()
