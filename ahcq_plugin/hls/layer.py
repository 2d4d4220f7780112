# SPDX-License-Identifier: Apache-2.0
"""One matmul to generate: what every stage takes, from the generator to synthesis."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ahcq_plugin.export import Matmul, PerHeadOperand, Spec, SpecError, UnitSpec
from ahcq_plugin.export.operands import Activation
from ahcq_plugin.hls.layout import Layout, lay_out
from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.vectors import Vectors


@dataclass(frozen=True, eq=False)
class CodeInput:
    """Codes that a layer reads while it runs.

    Attributes:
        side: ``left`` or ``right``.
        operand: their quantizer.
        rows: rows of a right operand; None for the left one, which may have any number.
        length: codes of a row.
    """

    side: str
    operand: Activation
    rows: int | None
    length: int

    @property
    def quantizer(self) -> str:
        """Name of the generated quantizer that makes these codes."""
        return f"{self.side}_quantizer"

    @property
    def is_per_head(self) -> bool:
        """Whether the quantizer has parameters for each head, and so has to know where products begin."""
        return isinstance(self.operand, PerHeadOperand)


@dataclass(frozen=True, eq=False)
class Layer:
    """A matmul, and how it is to be generated.

    Attributes:
        unit: name of its unit, "" for a matmul of its own.
        matmul: the matmul.
        options: size and speed.
        vectors: golden vectors of the test bench; None: random and directed rows.
    """

    unit: str
    matmul: Matmul
    options: HLSOptions = HLSOptions()
    vectors: Vectors | None = None

    @property
    def top(self) -> str:
        """C++ name of its top function, and name of its folder."""
        name = f"{self.unit}_{self.matmul.name}" if self.unit else self.matmul.name
        return "ahcq_" + re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()

    @property
    def is_product(self) -> bool:
        """Whether both operands come at run time (qk, av)."""
        return self.matmul.kind != "linear"

    @property
    def inputs(self) -> tuple[CodeInput, ...]:
        """The left operand and, of qk and av, the right one."""
        matmul = self.matmul
        left = CodeInput("left", matmul.left, None, matmul.k)
        if not self.is_product:
            return (left,)
        rows, length = (matmul.n, matmul.k) if matmul.kind == "qk" else (matmul.k, matmul.n)
        return left, CodeInput("right", matmul.right, rows, length)

    @cached_property
    def layout(self) -> Layout:
        """How the matmul lies in the hardware, made once; SpecError if it does not fit the options."""
        return lay_out(self.matmul, self.options)


def select(spec: Spec, patterns: Sequence[str] = ("*",), options: HLSOptions | None = None) -> list[Layer]:
    """The layers whose ``unit.matmul`` or unit matches one of the shell ``patterns``, in the order of the spec.

    Args:
        options: of all of them; None: the defaults.
    Raises:
        SpecError: a pattern matches nothing.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"`spec` must be a Spec, as load_spec reads it, got {type(spec).__name__}")
    if not isinstance(options, HLSOptions | None):
        raise TypeError(f"`options` must be HLSOptions, got {options!r:.60}")
    if (
        not isinstance(patterns, list | tuple)
        or not patterns
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise TypeError(f"`patterns` must be a list of names and globs, got {patterns!r:.60}")
    pairs = list(spec.matmuls())
    for pattern in patterns:
        if not any(_matches(unit, matmul, pattern) for unit, matmul in pairs):
            names = ", ".join(unit.name for unit in spec.units)
            raise SpecError(f"{pattern!r} matches no unit and no matmul (unit.matmul) of the spec; units: {names}")
    return [
        Layer(unit.name, matmul, options or HLSOptions())
        for unit, matmul in pairs
        if any(_matches(unit, matmul, pattern) for pattern in patterns)
    ]


def _matches(unit: UnitSpec, matmul: Matmul, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (unit.name, f"{unit.name}.{matmul.name}"))
